"""Random inpainting masks: `random_masks(batch, height, width, *, kinds=KINDS, generator) -> [B,H,W]` float32 0/1, 1 = repaint."""

from __future__ import annotations

KINDS = ("noise", "rectangles", "ellipses", "strokes", "full", "half")


def random_masks(batch, height, width, *, kinds=KINDS, generator=None):
    raise NotImplementedError
