"""What the training of the multimodal model has of its own beside its family in `tasks/multimodal.py`."""
