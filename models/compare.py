"""Two images side by side: what a slider between them shows, as one image."""

from __future__ import annotations

import torch
from torch import Tensor

from . import pixels

GAP = 8  # white pixels between the two


def side_by_side(before: Tensor, after: Tensor) -> Tensor:
    """Images [B,H,W,C] and [N,h,w,C], B = N or 1 or N = 1 -> [max(B,N),h,2 w + 8,3], before at after's size.

    Alpha is shown on white. Raises ValueError for batches of different lengths and what is no image.
    """
    left, right = (
        pixels.on_white(pixels.as_image(image, name))
        for image, name in ((before, "before"), (after, "after"))
    )
    count = max(len(left), len(right))
    if len(left) not in (1, count) or len(right) not in (1, count):
        raise ValueError(
            f"before has {len(left)} images but after has {len(right)}: give as many, or one of either."
        )
    left = pixels.resize_image(left, *right.shape[1:3])
    gap = torch.ones(count, right.shape[1], GAP, 3)
    wide = [half.expand(count, -1, -1, -1) for half in (left, right)]
    return torch.cat([wide[0], gap.to(right), wide[1]], dim=2)
