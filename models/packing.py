"""FLUX token packing: latents, masks, position ids and the 384 features of FLUX.1-Fill.

Rearrangements only, so every function here is exact and keeps dtype and device. Making an image's size
divisible by 16 is not done here: that is a choice with a name, see `models/geometry.py`.

Formulas: `_pack_latents`, `prepare_mask_latents`, `_prepare_latent_image_ids` of diffusers' FluxFillPipeline.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

VAE_FACTOR = 8  # pixels per latent cell
PATCH = 2  # latent cells per token
TOKEN_PIXELS = VAE_FACTOR * PATCH
MASK_CHANNELS = TOKEN_PIXELS**2


def _check_even(name: str, height: int, width: int, unit: str, multiple: int) -> None:
    if height <= 0 or width <= 0 or height % multiple or width % multiple:
        raise ValueError(
            f"{name} is {width}x{height} {unit}, but FLUX needs both sides to be multiples of {multiple}:"
            f" resize, crop or pad it first."
        )


def pack_latents(latents: Tensor) -> Tensor:
    """Latents [B,C,h,w] -> tokens [B,S,4C], S = (h/2)(w/2); any dtype.

    Raises ValueError unless h and w are even.
    """
    if latents.ndim != 4:
        raise ValueError(f"latents have shape {tuple(latents.shape)}: give [batch, channels, height, width].")
    _check_even("latents", *latents.shape[-2:], "cells", PATCH)
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B,S,4C] -> latents [B,C,height,width]; height and width count latent cells (pixels / 8).

    Raises ValueError if the tokens do not fill that size.
    """
    _check_even("the latent size", height, width, "cells", PATCH)
    if tokens.ndim != 3 or tokens.shape[1] * 4 != height * width or tokens.shape[2] % 4:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}, but latents of {width}x{height} cells need"
            f" [batch, {height * width // 4}, 4 x channels]: give the height and width of these tokens."
        )
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=height // 2, ph=PATCH, pw=PATCH)


def pack_mask(mask: Tensor) -> Tensor:
    """Pixel mask [B,H,W] or [B,1,H,W] -> mask tokens [B,S,256], S = (H/16)(W/16); values and dtype are kept.

    Each 8x8 block of pixels becomes 64 channels (y, x), then 2x2 blocks of those become one token.
    Raises ValueError unless H and W are multiples of 16.
    """
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 3:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: give [batch, height, width] or [batch, 1, height, width]."
        )
    _check_even("mask", *mask.shape[-2:], "pixels", TOKEN_PIXELS)
    return rearrange(
        mask, "b (h ph y) (w pw x) -> b (h w) (y x ph pw)", ph=PATCH, pw=PATCH, y=VAE_FACTOR, x=VAE_FACTOR
    )


def unpack_mask(tokens: Tensor, height: int, width: int) -> Tensor:
    """Mask tokens [B,S,256] -> pixel mask [B,H,W], the inverse of `pack_mask`.

    `height` and `width` may count latent cells or pixels; the number of tokens tells which.
    Raises ValueError if the tokens fill neither.
    """
    area = tokens.shape[1] * MASK_CHANNELS if tokens.ndim == 3 and tokens.shape[2] == MASK_CHANNELS else 0
    unit = 1 if height * width == area else VAE_FACTOR
    multiple = TOKEN_PIXELS // unit
    if height * width * unit**2 != area or height % multiple or width % multiple:
        raise ValueError(
            f"mask tokens have shape {tuple(tokens.shape)}, not [batch, tokens, {MASK_CHANNELS}] of a"
            f" {width}x{height} mask: give the size of the mask that was packed."
        )
    return rearrange(
        tokens,
        "b (h w) (y x ph pw) -> b (h ph y) (w pw x)",
        h=height // multiple,
        ph=PATCH,
        pw=PATCH,
        y=VAE_FACTOR,
        x=VAE_FACTOR,
    )


def image_ids(height: int, width: int, index: float = 0) -> Tensor:
    """Position ids [S,3] float32 = (index, row, column) of each token; height and width count latent cells.

    `index` is 0 for the image being made and 1, 2, ... for Kontext references.
    Raises ValueError unless both sides are even.
    """
    _check_even("the latent size", height, width, "cells", PATCH)
    rows, columns = torch.meshgrid(
        torch.arange(height // PATCH, dtype=torch.float32),
        torch.arange(width // PATCH, dtype=torch.float32),
        indexing="ij",
    )
    ids = torch.stack((torch.full_like(rows, index), rows, columns), dim=-1)
    return rearrange(ids, "h w c -> (h w) c")


def fill_features(latent_tokens: Tensor, masked_tokens: Tensor, mask_tokens: Tensor) -> Tensor:
    """Join noisy latents [B,S,64], masked-image latents [B,S,64] and mask [B,S,256] into [B,S,384].

    The last two follow the first's dtype and device, and a batch of 1 among them is repeated.
    Raises ValueError if the token counts or the batches do not agree.
    """
    parts = {"latent_tokens": latent_tokens, "masked_tokens": masked_tokens, "mask_tokens": mask_tokens}
    batch, count = latent_tokens.shape[:2]
    joined = []
    for name, part in parts.items():
        if part.ndim != 3 or part.shape[1] != count or part.shape[0] not in (1, batch):
            raise ValueError(
                f"{name} have shape {tuple(part.shape)} beside {batch} x {count} latent tokens:"
                " pack all three from images of one size and one batch."
            )
        joined.append(part.to(latent_tokens).expand(batch, -1, -1))
    return torch.cat(joined, dim=-1)
