"""Looking at what the models see: tokens of a prompt, shapes of a model call, schedules.

Drawn with PIL alone (`drawing.py`). Nothing here runs a model: shapes are worked out from the weights' own
shapes, and tests/unit/test_inspect_shapes.py holds them against hooks on running models.
"""
