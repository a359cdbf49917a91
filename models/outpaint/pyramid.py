"""Push-pull: smooth values wherever nothing is known, from a pyramid of weighted averages.

Burt and Adelson's hierarchical interpolation as in Gortler et al., "The Lumigraph", 1996, section 3.4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def push_pull(values: Tensor, weight: Tensor) -> Tensor:
    """values [B,C,H,W] where weight [B,1,H,W] (0..1) is 1, elsewhere smoothly continued.

    0 if nothing is known. Time and memory are linear in the pixels.
    """
    height, width = values.shape[-2:]
    if height == width == 1 or bool((weight >= 1).all()):
        return values * (weight > 0)
    padding = (0, width % 2, 0, height % 2)
    known, total = (F.pad(plane, padding) for plane in (values * weight, weight))
    total = F.avg_pool2d(total, 2) * 4
    coarse = F.avg_pool2d(known, 2) * 4 / total.clamp(min=torch.finfo(values.dtype).tiny)
    coarse = push_pull(coarse, total.clamp(max=1))
    fine = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    return torch.lerp(fine[..., :height, :width], values, weight.to(values.dtype))
