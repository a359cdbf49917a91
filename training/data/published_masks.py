"""The random masks of two published inpainting trainings, each with its own distribution; 1 = repaint.

glid-3-xl-stable's `image_train_inpaint.py` draws in latent cells, diffusers' DreamBooth inpainting script in
pixels. What they draw is kept, not how their code says it.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CELL = 8  # pixels
EVERYTHING, BLUR, BOXES = range(3)
OF_101 = (20, 50)  # glid draws from 0..100, which are 101 values: a 20 in 101 chance, not one of 0.2
RADIUS = 17  # of the Gaussian kernel, 35 wide
MOST_BOXES = 4


def glid_kinds(batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Which of EVERYTHING (0.198), BLUR (0.397) and BOXES (0.405) each of [B] masks is."""
    first, second = torch.randint(0, 101, (2, batch), generator=generator)
    kinds = torch.where(second < OF_101[1], BLUR, BOXES)
    return kinds.masked_fill(first < OF_101[0], EVERYTHING)


def glid_cells(kinds: Tensor, rows: int, columns: int, generator: torch.Generator | None = None) -> Tensor:
    """Masks of these kinds [B] in latent cells, bool [B,rows,columns]; every one repaints something.

    Blurred noise repaints a half, in blobs; boxes are 1 to 4 rectangles of at most half the area each, which
    may overlap.
    """
    blurred = _blurred(len(kinds), rows, columns, generator)
    boxes = _boxes(len(kinds), rows, columns, generator)
    takes = (kinds == BLUR) & blurred.flatten(1).any(1)  # on a few cells the noise may be all of one sign
    holes = torch.where(takes[:, None, None], blurred, boxes)
    return holes | (kinds == EVERYTHING)[:, None, None]


def glid(batch: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """glid's masks in pixels: whole cells of 8 x 8. [B,H,W] bool."""
    rows, columns = -(-height // CELL), -(-width // CELL)
    cells = glid_cells(glid_kinds(batch, generator), rows, columns, generator)
    return cells.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)[:, :height, :width]


def _blurred(batch: int, rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """Normal noise, blurred by a Gaussian of 0.1 to 5 cells over reflected borders, and negative."""
    sigma = 0.1 + 4.9 * torch.rand(batch, 1, generator=generator)
    field = torch.randn(batch, rows, columns, generator=generator)
    for _ in range(2):
        radius = min(RADIUS, field.shape[2] - 1)
        offsets = torch.arange(-radius, radius + 1) / sigma
        kernel = torch.softmax(-(offsets**2) / 2, dim=1)
        windows = F.pad(field, (radius, radius), mode="reflect").unfold(2, 2 * radius + 1, 1)
        field = torch.einsum("bijk,bk->bji", windows, kernel)  # and turned: the next time, the other axis
    return field <= 0


def _boxes(batch: int, rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    def upto(most: Tensor | int, low: int) -> Tensor:
        """Whole numbers of low..most, uniform, [B,4]."""
        share = torch.rand(batch, MOST_BOXES, generator=generator)
        return low + (share * (most - low + 1)).long()

    half = rows * columns // 2
    width, height = upto(columns, 1), upto(rows, 1)
    large, narrower = width * height > half, upto(100, 0) < OF_101[1]
    width, height = (
        torch.where(large & narrower, (half // height).clamp_min(1), width),
        torch.where(large & ~narrower, (half // width).clamp_min(1), height),
    )
    left, top = upto(columns - width, 0)[..., None, None], upto(rows - height, 0)[..., None, None]
    y, x = torch.arange(rows)[:, None], torch.arange(columns)
    inside = (
        (y >= top) & (y < top + height[..., None, None]) & (x >= left) & (x < left + width[..., None, None])
    )
    present = torch.arange(MOST_BOXES) < upto(MOST_BOXES, 1)[:, :1]
    return (inside & present[..., None, None]).any(1)


def dreambooth_mask(height: int, width: int, rng: random.Random) -> Tensor:
    """One rectangle or ellipse of any size and place, [H,W] bool: the script's box for the same state of
    `rng`, down to a single pixel.
    """
    from PIL import Image, ImageDraw

    wide, high = rng.randint(0, width), rng.randint(0, height)
    x, y = rng.randint(wide // 2, width - wide // 2), rng.randint(high // 2, height - high // 2)
    image = Image.new("1", (width, height))
    draw = ImageDraw.Draw(image)
    shape = draw.ellipse if rng.randint(0, 1) else draw.rectangle
    shape((x - wide // 2, y - high // 2, x + wide // 2, y + high // 2), fill=1)
    return torch.from_numpy(np.array(image))


def dreambooth(batch: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """The DreamBooth inpainting script's masks. [B,H,W] bool."""
    seeds = torch.randint(0, 2**31, (batch,), generator=generator).tolist()
    return torch.stack([dreambooth_mask(height, width, random.Random(seed)) for seed in seeds])
