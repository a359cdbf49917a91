"""glid-3-xl-stable's geometry and its conventions, which stand nowhere else in the pack.

In glid a mask is True where pixels are *kept*; everywhere else in the pack 1 is what is repainted. It has no
mask channel: unknown latent cells are exact zeros.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import check_choice

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
    """glid's `--mask`: which cells [H,W] stay known, given a mask image [H,W] in 0..1.

    The mask has the shape of the enlarged canvas; values above 0.5 are white. `white_means`: `keep`, as in
    glid's own files, or `repaint`, as everywhere else. Raises ValueError for a mask of another size.
    """
    check_choice("white_means", white_means, ("keep", "repaint"))
    if mask.shape != known.shape:
        raise ValueError(
            f"mask is {mask.shape[-1]}x{mask.shape[-2]} but the canvas has {known.shape[1]}x{known.shape[0]}"
            " cells: resize the mask to the enlarged canvas."
        )
    white = mask > 0.5
    return known & (white if white_means == "keep" else ~white)


def image_embed(canvas: Tensor, known: Tensor) -> Tensor:
    """The four extra channels of the model [B,4,h,w]: the scaled canvas, exact zeros where unknown."""
    return canvas * SCALE * known


def guided(positive: Tensor, negative: Tensor, scale: float, quirk: bool = True) -> Tensor:
    """Classifier-free guidance on [B,4,h,w]; glid's quirk leaves the fourth channel the conditional one."""
    mixed = negative + scale * (positive - negative)
    return torch.cat((mixed[:, :3], positive[:, 3:]), dim=1) if quirk else mixed
