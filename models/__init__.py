"""Plain PyTorch: what builds conditions and holds weights."""
