"""glid-3-xl-stable's canvases, masks and guidance, on plain tensors.

In glid a mask is True where pixels are *kept*; everywhere else in the pack 1 is what is repainted. It has no
mask channel: unknown latent cells are exact zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry import check_choice

GROWS = {  # direction -> (left, top, right, bottom)
    "expand": (1, 1, 1, 1),
    "wider": (1, 0, 1, 0),
    "taller": (0, 1, 0, 1),
    "left": (1, 0, 0, 0),
    "right": (0, 0, 1, 0),
    "top": (0, 1, 0, 0),
    "bottom": (0, 0, 0, 1),
    "": (0, 0, 0, 0),
}
DIRECTIONS = tuple(GROWS)
AMOUNT = 32  # cells, 256 pixels
CELL = 8  # pixels
CHANNELS = 4  # of a latent
WHITE = ("keep", "repaint")
SCALE = 0.18215  # glid's canvas is unscaled; what the model sees is scaled


class Sides(NamedTuple):
    """How much an image grows on each side."""

    left: int
    top: int
    right: int
    bottom: int


def sides(direction: str, size: tuple[int, int], amount: int | float | str = AMOUNT) -> Sides:
    """How much each side grows for a direction; the unit is that of `size` (height, width): cells or pixels.

    `amount`: a whole number, a fraction below 1 of the axis's own length, or "half". Raises ValueError for
    another amount or direction.
    """
    check_choice("direction", direction, DIRECTIONS)
    fraction = 0.5 if amount == "half" else amount
    if isinstance(fraction, str) or not fraction > 0 or (fraction >= 1 and fraction != int(fraction)):
        raise ValueError(f"amount is {amount!r}: give a whole number, a fraction below 1, or 'half'.")
    lengths = (size[1], size[0]) * 2
    if fraction < 1:
        steps = [math.floor(fraction * length + 1e-9) for length in lengths]
    else:
        steps = [int(fraction)] * 4
    return Sides(*(step * grows for step, grows in zip(steps, GROWS[direction], strict=True)))


def glid_canvas(latent: Tensor, direction: str, amount: int | float | str = AMOUNT) -> tuple[Tensor, Tensor]:
    """Latents [B,C,h,w] on glid's canvas [B,C,H,W], new cells exactly 0, and `known`, bool [H,W].

    `direction`: expand, wider, taller, left, right, top, bottom, or "" for none. `amount` in cells, as in
    `sides`. For pixels: `expand(image, **sides(direction, size, amount)._asdict(), multiple=1)`. Raises
    ValueError for other shapes.
    """
    if latent.ndim != 4 or latent.numel() == 0:
        raise ValueError(f"latent has shape {tuple(latent.shape)}: give [batch, channels, height, width].")
    height, width = latent.shape[2:]
    left, top, right, bottom = sides(direction, (height, width), amount)
    canvas = latent.new_zeros(*latent.shape[:2], height + top + bottom, width + left + right)
    canvas[..., top : top + height, left : left + width] = latent
    known = torch.zeros(canvas.shape[2:], dtype=torch.bool, device=latent.device)
    known[top : top + height, left : left + width] = True
    return canvas, known


def known_from_mask(mask: Tensor, known: Tensor, white_means: str = "keep") -> Tensor:
    """glid's `--mask`: what stays known [...,H,W], given a mask image [...,H,W] in 0..1 of that shape.

    `white_means`: `keep`, as in glid's own files (above 0.5), or `repaint`, as everywhere else (from 0.5 on).
    """
    check_choice("white_means", white_means, WHITE)
    if mask.shape != known.shape:
        raise ValueError(
            f"mask is {mask.shape[-1]}x{mask.shape[-2]} but the canvas has {known.shape[-1]}x"
            f"{known.shape[-2]} cells: resize the mask to the enlarged canvas."
        )
    return known & ((mask > 0.5) if white_means == "keep" else (mask < 0.5))


def known_latents(
    encode: Callable[[Tensor], Tensor], image: Tensor, mask: Tensor, white_means: str = "repaint"
) -> tuple[Tensor, Tensor]:
    """An image [B,H,W,3] and its mask [B,H,W] as glid's canvas: latents [B,4,h,w], and bool [B,1,h,w].

    Cells with an unknown pixel are unknown, exactly 0 and False. Only the rectangle around the known ones is
    encoded (`encode`: [B,H,W,3] to latents, one for 8 x 8 pixels), so that the gray of an empty canvas does
    not leak into its edge. Sides divide by 8. Raises ValueError if all of it is known.
    """
    everything = torch.ones(mask.shape, dtype=torch.bool, device=mask.device)
    unknown = (~known_from_mask(mask, everything, white_means)).float()[:, None]
    known = F.max_pool2d(unknown, CELL) == 0
    if bool(known.all()):
        raise ValueError("mask is empty, so nothing would be repainted: mark a part of the image.")
    if not bool(known.any()):
        return image.new_zeros(len(image), CHANNELS, *known.shape[2:]), known
    rows, columns = (known.any(dim=(0, 1)).any(dim=axis).nonzero().flatten() for axis in (1, 0))
    top, left, bottom, right = (int(end) for end in (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1))
    part = encode(image[:, CELL * top : CELL * bottom, CELL * left : CELL * right])
    latents = part.new_zeros(max(len(part), len(known)), part.shape[1], *known.shape[2:])
    latents[:, :, top:bottom, left:right] = part
    return latents * known.to(latents), known


def image_embed(canvas: Tensor, known: Tensor, scale: float = SCALE) -> Tensor:
    """The four extra channels of the model [B,4,h,w]: the scaled canvas, exact zeros where unknown."""
    return canvas * scale * known


def guided(positive: Tensor, negative: Tensor, scale: float, quirk: bool = True) -> Tensor:
    """Classifier-free guidance on [B,4,h,w]; glid's quirk leaves the fourth channel the conditional one."""
    mixed = negative + scale * (positive - negative)
    return torch.cat((mixed[:, :3], positive[:, 3:]), dim=1) if quirk else mixed
