"""What the VAE is given for FLUX Fill and FLUX Kontext: sized, masked, batched images. No VAE, no model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import geometry, packing, pixels
from .diptych import Layout
from .geometry import check_choice

GRAY = 0.5  # a masked pixel: zero in the VAE's range -1..1, as in FluxFillPipeline
SIZE_POLICIES = ("preferred", "keep", "megapixels")


class FillInput(NamedTuple):
    """image [b,H,W,3] (b is 1 or B), masked [B,H,W,3] and mask [B,1,H,W], 1 = repaint; sides divide by 16."""

    image: Tensor
    masked: Tensor
    mask: Tensor


def fill_input(
    image: Tensor, mask: Tensor | None = None, *, mask_tokens: Tensor | None = None, policy: str = "stretch"
) -> FillInput:
    """Image [B,H,W,C] and a mask of any size, or mask tokens [B,S,256] -> what FLUX Fill is conditioned on.

    A mask is binarised at 0.5; mask tokens are used as they are, soft if they are soft. Sides that do not
    divide by 16 follow `policy`. Unequal batches repeat as in ComfyUI.

    Raises ValueError unless exactly one of mask and mask tokens is given, if it repaints nothing, and if the
    tokens are of another size.
    """
    if (mask is None) == (mask_tokens is None):
        count = "neither of mask and mask_tokens is" if mask is None else "both mask and mask_tokens are"
        raise ValueError(f"{count} connected: connect one of them.")
    image = pixels.as_image(image)
    size = tuple(image.shape[1:3])
    fit = geometry.check_panel(size, geometry.keep_scale(size, policy, masked=True))
    image = pixels.fit_image(image, fit)
    if mask is not None:
        mask = pixels.resize_mask(pixels.painted(mask, needed=True), *size)
        mask = pixels.fit_painted(mask, fit)
    else:
        if not isinstance(mask_tokens, Tensor):
            kind = type(mask_tokens).__name__
            raise ValueError(f"mask_tokens is a {kind}: connect the mask_tokens of a Mask Packer.")
        needed = fit.panel[0] * fit.panel[1] // packing.MASK_CHANNELS
        if mask_tokens.ndim == 3 and mask_tokens.shape[1] != needed:
            raise ValueError(
                f"mask_tokens are {mask_tokens.shape[1]} tokens but the {fit.panel[1]}x{fit.panel[0]} image"
                f" needs {needed}: connect this image to the Mask Packer as well."
            )
        mask = pixels.as_mask(packing.unpack_mask(mask_tokens, *fit.panel), "mask_tokens")
        if not bool(mask.flatten(1).any(dim=1).all()):
            raise ValueError(
                "mask_tokens are of an empty mask, so nothing would be repainted: paint the mask."
            )
    mask = mask.to(image.device)
    batch = max(len(image), len(mask))
    mask = pixels.repeat_batch(mask, batch)
    image = image if len(image) == 1 else pixels.repeat_batch(image, batch)
    gray = torch.full((), GRAY, device=image.device)
    masked = torch.lerp(image.expand(batch, -1, -1, -1), gray, mask[..., None])  # exact at 0 and 1
    return FillInput(image, masked, mask[:, None])


class Reference(NamedTuple):
    """An image [B,H,W,3] at a size Kontext takes, its mask [B,1,H,W] or None, and the way back."""

    image: Tensor
    mask: Tensor | None
    layout: Layout


def reference(
    image: Tensor,
    *,
    size: str = "preferred",
    policy: str = "auto",
    megapixels: float = 1.0,
    mask: Tensor | None = None,
) -> Reference:
    """Bring an image [B,H,W,C] to a size for FLUX Kontext.

    - `size`: `preferred` is the one of the 17 trained sizes with the nearest aspect, `keep` the image's own
      in multiples of 16, `megapixels` about that many times 2**20 pixels at the image's aspect.
    - `policy`: `stretch` (as FluxKontextPipeline), `crop`, `pad`, or `auto` (`geometry.resolve`).
    - `mask`: repaint only there (cut at 0.5, empty is none); the layout returns the source itself elsewhere.

    `str(layout)` says what was done. Raises ValueError for whatever it cannot take.
    """
    check_choice("size", size, SIZE_POLICIES)
    source = pixels.as_image(image)
    source_size = tuple(source.shape[1:3])
    mask = pixels.painted(mask)
    masked = mask is not None
    if size == "keep":
        fit = geometry.keep_scale(source_size, policy, masked)
    elif size == "preferred":
        fit = geometry.place(source_size, geometry.kontext_size(source_size), policy, masked)
    else:
        fit = geometry.place(source_size, geometry.area_size(source_size, megapixels), policy, masked)
    geometry.check_panel(source_size, fit)
    if mask is not None:
        mask = pixels.binarise(pixels.resize_mask(mask, *source_size)).to(source.device)
        batch = max(len(source), len(mask))
        source, mask = pixels.repeat_batch(source, batch), pixels.repeat_batch(mask, batch)
    layout = Layout(source_size, fit.panel, "none", fit.policy, fit.shown, fit.filled, source, mask)
    panel_mask = None if mask is None else pixels.fit_painted(mask, fit)[:, None]
    return Reference(pixels.fit_image(source, fit), panel_mask, layout)
