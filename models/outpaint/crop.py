"""Context crop: only the hole and its surroundings go through the model, at the model's own size.

`paste_back` stitches the result into the image again; outside the mask nothing changes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import pixels
from ..geometry import Box
from . import inputs
from .canvas import CanvasLayout


def crop_context(
    image: Tensor,
    mask: Tensor,
    *,
    context: float = 1.5,
    size: int | None = 1024,
    multiple: int = 16,
    highpass: float = 0.1,
    fill_holes: bool = False,
    blend: int = 0,
) -> tuple[Tensor, Tensor, CanvasLayout]:
    """The surroundings of the hole: crop [B,h,w,3], mask [B,h,w], layout.

    - `context`: how many times the hole's width and height the crop shows, as far as the image goes.
    - `size`: the crop is resized to about size x size pixels at its own aspect; None or 0 keeps the scale.
      Its sides are multiples of `multiple`.
    - `highpass`: mask values below it are dropped. `fill_holes`: known islands inside the hole are repainted.
    - `blend`: px inside the hole over which the result fades in when it is pasted back.

    A batch of masks over one image gives one crop each, all of one size (that of the largest hole), so that
    they can be sampled together; `paste_back(..., join=True)` puts all of them into the one image.
    Raises ValueError for an empty mask, a mask of another size and NaN.
    """
    if not (math.isfinite(context) and context >= 1):
        raise ValueError(f"context is {context}: use 1 (the hole alone) or more.")
    multiple = inputs.whole_number(multiple, "multiple", 1)
    size = inputs.whole_number(size or 0, "size")
    blend = inputs.whole_number(blend, "blend")
    image = pixels.rgb(inputs.checked(image))
    mask = inputs.hole(mask, image.shape[1:3]).to(image.device)
    mask = torch.where(mask >= highpass, mask, 0)
    inputs.check_painted(mask)
    if fill_holes:
        mask = torch.where(enclosed(mask > 0), 1, mask)
    batch = max(len(image), len(mask))
    image, mask = pixels.repeat_batch(image, batch), pixels.repeat_batch(mask, batch)

    holes = [_box_of(item) for item in mask]
    shape = tuple(image.shape[1:3])
    seen = tuple(max(math.ceil(hole[axis] * context) for hole in holes) for axis in (2, 3))
    region, crop_size = _sizes(seen, shape, size, multiple)
    spots = tuple(_around(hole, region, shape) for hole in holes)
    crops = torch.cat([item[None, at.rows, at.columns] for item, at in zip(image, spots, strict=True)])
    parts = torch.cat([item[None, at.rows, at.columns] for item, at in zip(mask, spots, strict=True)])
    parts = pixels.resize_mask(parts, *crop_size)
    whole = Box(0, 0, *shape)
    layout = CanvasLayout(
        source_size=shape,
        canvas_size=crop_size,
        finished_size=shape,
        shown=whole,
        placed=whole,
        part=Box(0, 0, *crop_size),
        spots=spots,
        mask=mask * pixels.inner_ramp((mask > 0).float(), blend) if blend else mask,
    )
    return pixels.resize_image(crops, *crop_size), parts, layout


def _box_of(hole: Tensor) -> Box:
    """The smallest box around all of the mask [H,W] that is above 0."""
    rows, columns = (hole.amax(dim=axis).nonzero().flatten() for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    return Box(top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left)


def _sizes(seen, shape, size: int, multiple: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(region of the image, crop), (height, width) each; the region grows until the aspects agree."""
    seen = tuple(min(pair) for pair in zip(seen, shape, strict=True))
    scale = size / math.sqrt(seen[0] * seen[1]) if size else 1.0
    crop = tuple(max(math.ceil(side * scale / multiple - 1e-9), 1) * multiple for side in seen)
    region = tuple(
        min(max(round(side / scale), least), most)
        for side, least, most in zip(crop, seen, shape, strict=True)
    )
    return region, crop


def _around(hole: Box, region: tuple[int, int], shape: tuple[int, int]) -> Box:
    """A box of `region` centred on the hole, moved until it lies inside the image."""
    starts = (
        min(max(start + (extent - length) // 2, 0), whole - length)
        for start, extent, length, whole in zip(hole[:2], hole[2:], region, shape, strict=True)
    )
    return Box(*starts, *region)


def enclosed(hole: Tensor) -> Tensor:
    """What the hole [B,H,W] bool encloses, itself included: all that cannot be reached from the frame.

    Reached pixels spread along whole runs of known pixels, over rows and columns in turn.
    """
    known = ~hole
    reached = torch.zeros_like(known)
    reached[:, 0], reached[:, -1] = known[:, 0], known[:, -1]
    reached[..., 0], reached[..., -1] = known[..., 0], known[..., -1]
    while True:
        before = reached
        reached = _along_rows(reached, known)
        reached = _along_rows(reached.transpose(1, 2), known.transpose(1, 2)).transpose(1, 2)
        if torch.equal(before, reached):
            return ~reached


def _along_rows(reached: Tensor, known: Tensor) -> Tensor:
    """Every run of known pixels that has a reached one in it, wholly reached."""
    walls = (~known).long()
    walls[..., 0] += 1  # a run ends with its row
    run = walls.flatten().cumsum(0)
    hit = torch.zeros(int(run[-1]) + 1, dtype=torch.bool, device=run.device)
    hit[run[reached.flatten()]] = True
    return hit[run].reshape(known.shape) & known
