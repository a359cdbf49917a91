"""How Stable Diffusion inpainting is told of a hole: the masked image, and the mask in latent cells.

The rules of both hosts: the shell's `sd_inpaint.py` and the SD Inpaint Conditioner encode what comes from
here. No VAE, no model. FLUX Fill, which sees every pixel of a mask, has `condition.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import geometry, pixels
from .geometry import check_choice
from .packing import VAE_FACTOR

GRAY = 0.5  # a masked pixel: zero in the VAE's range -1..1
MASK_RESIZE = ("max", "nearest", "bilinear", "area")
MASKED = ("gray", "original")
SOFT = "diptych_soft_mask"  # in a ComfyUI conditioning; see `comfy_inpaint.py`


class MaskRule(NamedTuple):
    """What a nine-channel model is told of a mask.

    - resize: pixels to latent cells, see `latent_mask`.
    - threshold: a pixel of at least this much is repainted.
    - soft: gray values reach the model instead; pixels under them are mixed with gray by as much.
    - masked: `gray` hides what is repainted, as the models were trained; `original` shows it to them.
    """

    resize: str = "max"
    threshold: float = pixels.MASK_THRESHOLD
    soft: bool = False
    masked: str = "gray"

    def checked(self) -> MaskRule:
        """Itself. Raises ValueError for an unknown resize or masked, or a threshold outside 0..1."""
        check_choice("mask_resize", self.resize, MASK_RESIZE)
        check_choice("masked", self.masked, MASKED)
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}: give a number above 0, up to 1.")
        return self


USUAL = MaskRule()


class Told(NamedTuple):
    """masked image [B,H,W,3], mask [B,1,H,W] (1 = repaint), and the mask in cells [B,1,H/8,W/8]."""

    masked: Tensor
    mask: Tensor
    cells: Tensor


def tell(image: Tensor, mask: Tensor, rule: MaskRule = USUAL) -> Told:
    """What the model is told of an image [B,H,W,3] in 0..1 with a mask [B,H,W]; sides divide by 8.

    Either batch may be 1. Raises ValueError for an unknown rule.
    """
    rule.checked()
    told = cut(mask, rule)
    masked = image
    if rule.masked == "gray":
        gray = torch.full((), GRAY, device=image.device)
        weight = told[..., None].to(image)
        masked = torch.lerp(image.expand(max(len(image), len(weight)), -1, -1, -1), gray, weight)
    return Told(masked, told[:, None], latent_mask(told[:, None], rule.resize, soft=rule.soft))


def prepared(
    image: Tensor, mask: Tensor, rule: MaskRule = USUAL, policy: str = "stretch"
) -> tuple[Tensor, Told]:
    """As `tell`, of an image [B,H,W,C] and mask of any size: (image [B,h,w,3] with sides of 8, told).

    Sides that do not divide by 8 follow `policy` (`geometry.keep_scale`). Unequal batches repeat as in
    ComfyUI. Raises ValueError for a mask that repaints nothing, and whatever it cannot take.
    """
    image = pixels.as_image(image)
    size = tuple(image.shape[1:3])
    fit = geometry.check_panel(size, geometry.keep_scale(size, policy, True, VAE_FACTOR))
    mask = cut(pixels.as_mask(mask), rule.checked())
    _check_painted(mask, rule)
    mask = pixels.fit_mask(pixels.resize_mask(mask, *size), fit).to(image.device)
    _check_painted(mask, rule)
    image = pixels.fit_image(image, fit)
    batch = max(len(image), len(mask))
    mask = pixels.repeat_batch(mask, batch)
    image = image if len(image) == 1 else pixels.repeat_batch(image, batch)
    return image, tell(image, mask, rule)


def _check_painted(mask: Tensor, rule: MaskRule) -> None:
    if not bool(mask.flatten(1).any(dim=1).all()):
        least = "white" if rule.soft else f"{rule.threshold:g} or more"
        raise ValueError(f"mask is nowhere {least}, so nothing would be repainted: paint what to fill.")


def cut(mask: Tensor, rule: MaskRule) -> Tensor:
    """The mask as the rule reads it: 0 and 1, or as it is if the rule is soft."""
    return mask if rule.soft else (mask >= rule.threshold).to(mask.dtype)


def latent_mask(mask: Tensor, how: str = "max", *, soft: bool = False) -> Tensor:
    """Mask [B,1,H,W] in 0..1 to latent cells [B,1,H/8,W/8]: 0 and 1, or with `soft` what lies between.

    - max: a cell is repainted if any of its pixels is, so that no half-blank cell counts as known: no seam.
    - nearest: the cell's first pixel decides, as in StableDiffusionInpaintPipeline.
    - bilinear: the mean of its four middle pixels, more than half, as in ComfyUI's core.
    - area: the mean of all 64, at least half.
    """
    check_choice("mask_resize", how, MASK_RESIZE)
    if how == "max":
        return F.max_pool2d(mask, VAE_FACTOR)
    if how == "nearest":
        return mask[..., ::VAE_FACTOR, ::VAE_FACTOR]
    if how == "bilinear":
        size = tuple(side // VAE_FACTOR for side in mask.shape[-2:])
        cells = F.interpolate(mask, size=size, mode="bilinear")
        return cells if soft else cells.round()  # 0.5 becomes 0 there
    cells = F.avg_pool2d(mask, VAE_FACTOR)
    return cells if soft else (cells >= 0.5).to(cells)
