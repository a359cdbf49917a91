"""Inpainting with a model that knows no mask: a ControlNet's hint, latents put back, a composite at the end.

What webui calls `inpaint_only` (with a LaMa fill before it, `inpaint_only+lama`), as facts on pixels, for
both hosts. No model: `sd_blend.py` samples in the shell, the ControlNet Inpaint node prepares ComfyUI's
samplers. Models with a channel for the mask have `inpaint_masks.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import geometry, outpaint, pixels
from .packing import VAE_FACTOR

HOLE = -1.0  # what control_v11p_sd15_inpaint was trained to read as "paint here"
NONE = "none"
DILATE, BLUR = 7, 7  # px of the composite's mask, squares
REACH = (DILATE + BLUR) // 2 - 1  # px around the mask beyond which the composite is the image itself


class ControlInput(NamedTuple):
    """Image [B,H,W,3] at the result's size, the same with its hole filled, and the hard mask [B,H,W]."""

    image: Tensor
    filled: Tensor
    mask: Tensor


def prepared(
    image: Tensor, mask: Tensor, *, prefill: str = NONE, policy: str = "stretch", **options
) -> ControlInput:
    """An image [B,H,W,C] and a mask of any size (cut at 0.5) as they go in; sides divide by 8.

    prefill: `none`, or one of `outpaint.FILLS` with its options: what the hole shows to the VAE, from which
    sampling starts. Unequal batches repeat as in ComfyUI. Raises ValueError for a mask that repaints nothing.
    """
    image = pixels.as_image(image)
    size = tuple(image.shape[1:3])
    fit = geometry.check_panel(size, geometry.keep_scale(size, policy, True, VAE_FACTOR))
    mask = pixels.resize_mask(pixels.painted(mask, needed=True), *size)
    mask = pixels.fit_painted(mask, fit).to(image.device)
    image = pixels.fit_image(image, fit)
    batch = max(len(image), len(mask))
    image, mask = pixels.repeat_batch(image, batch), pixels.repeat_batch(mask, batch)
    filled = image if prefill == NONE else outpaint.fill(image, mask, prefill, **options)
    return ControlInput(image, filled, mask)


def hint(image: Tensor, mask: Tensor) -> Tensor:
    """The ControlNet's image [B,H,W,3]: the image in 0..1, exactly -1 in all channels under the mask."""
    return torch.where(pixels.binarise(mask)[..., None] > 0, HOLE, image)


def cells(mask: Tensor) -> Tensor:
    """Hard mask [B,H,W] to latent cells [B,1,H/8,W/8]: repainted within a pixel of the mask, one more."""
    return F.max_pool2d(mask[:, None], 10, stride=VAE_FACTOR, padding=1)


def composite_mask(mask: Tensor) -> Tensor:
    """Hard mask [B,H,W] to how much of the result the finished image takes: grown by 3 px, blurred over 7.

    0 from `REACH` + 1 px on. finished = weight * result + (1 - weight) * image.
    """
    grown = F.max_pool2d(mask[:, None], DILATE, stride=1, padding=DILATE // 2)
    edge = F.pad(grown, [BLUR // 2] * 4, mode="replicate")
    return F.avg_pool2d(edge, BLUR, stride=1)[:, 0].clamp_(0, 1)


def composite(result: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """The finished image [B,H,W,3]: the result where the mask is, the image bit for bit farther out."""
    weight = composite_mask(mask)[..., None].to(image)
    return torch.lerp(image, result.to(image), weight.expand_as(image))
