"""The canvas: an image with room around it, the mask of what is unknown, and the way back.

Sizes are (height, width) in pixels. Nothing is resampled here, so that known pixels can return bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import pixels
from ..geometry import Box, check_choice
from . import inputs
from .amounts import UNITS, in_pixels

GROUND = 0.5  # gray, as ComfyUI's own padding: what a Fill model is shown where nothing is known


@dataclass(frozen=True)
class CanvasLayout:
    """How a canvas and the finished image belong together; made by `expand` and by `crop_context`.

    `shown` of the source stands at `placed` in the finished image, and `part` of the canvas goes, resized
    where the sizes differ, to `spots` of it: one box per item, or one for all. `mask` [B,H,W] has the size of
    the finished image, 1 = taken from the canvas; it takes no part in comparisons.
    """

    source_size: tuple[int, int]
    canvas_size: tuple[int, int]
    finished_size: tuple[int, int]
    shown: Box
    placed: Box
    part: Box
    spots: tuple[Box, ...]
    mask: Tensor | None = field(default=None, compare=False, repr=False)


def expand(
    image: Tensor,
    *,
    left: float = 0,
    top: float = 0,
    right: float = 0,
    bottom: float = 0,
    unit: str = "px",
    multiple: int = 16,
    mask: Tensor | None = None,
    overlap: float = 0,
    feather: int = 0,
    ground: float = GROUND,
) -> tuple[Tensor, Tensor, CanvasLayout]:
    """Give an image [B,H,W,C] room on its sides: canvas [B,h,w,3], mask [B,h,w] (1 = unknown), layout.

    - The amounts, by `unit`: `px`; `cells` of 8 px; `fraction` of the image's own side, rounded down;
      `aspect`: the width / height to reach; `size`: the width (left, right) or height (top, bottom) to reach.
      The last two grow the sides that they are given to, in equal shares. Negative amounts crop.
    - `multiple`: both sides of the canvas are rounded up to it. The rest lies outside the amounts asked for
      (on an axis that does not grow: below or right), is unknown too, and `paste_back` cuts it off again.
    - `mask` [B,H,W] of the image's size: unknown pixels of the image itself, at most one mask per item.
    - `overlap`: px of the image along each growing side that are repainted as well; below 1 a fraction of
      its side. `feather`: px over which the mask then fades into the image, ((f - d) / f)^2 as in ComfyUI.
    - `ground`: the gray of the new area until it is filled; webui's mk2 expects 0.

    Raises ValueError in one sentence for amounts that leave nothing and for whatever it cannot take.
    """
    check_choice("unit", unit, UNITS)
    multiple = inputs.whole_number(multiple, "multiple", 1)
    feather = inputs.whole_number(feather, "feather")
    source = inputs.checked(image)
    size = tuple(source.shape[1:3])
    own = None if mask is None else inputs.hole(mask, size)
    amounts = in_pixels({"left": left, "top": top, "right": right, "bottom": bottom}, unit, size)
    columns = _make_axis(("left", "right"), amounts, size[1], multiple)
    rows = _make_axis(("top", "bottom"), amounts, size[0], multiple)

    canvas_size = (rows.canvas, columns.canvas)
    batch = max(len(source), 1 if own is None else len(own))
    shown = Box(rows.cut, columns.cut, rows.kept, columns.kept)
    spot = Box(rows.start, columns.start, rows.kept, columns.kept)
    canvas = source.new_full((batch, *canvas_size, 3), ground)
    known = pixels.rgb(source)[:, shown.rows, shown.columns]
    canvas[:, spot.rows, spot.columns] = pixels.repeat_batch(known, batch)

    ramps = (rows.ramp(overlap, feather, "height"), columns.ramp(overlap, feather, "width"))
    edge = torch.maximum(ramps[0][:, None], ramps[1][None, :]).to(source.device)
    hole = edge.expand(batch, *canvas_size).clone()
    if own is not None:
        inside = hole[:, spot.rows, spot.columns]
        own = pixels.repeat_batch(own.to(hole), batch)[:, shown.rows, shown.columns]
        inside.copy_(torch.maximum(inside, own))

    part = Box(rows.outside, columns.outside, rows.asked, columns.asked)
    layout = CanvasLayout(
        source_size=size,
        canvas_size=canvas_size,
        finished_size=part[2:],
        shown=shown,
        placed=Box(spot.top - part.top, spot.left - part.left, *spot[2:]),
        part=part,
        spots=(Box(0, 0, *part[2:]),),
        mask=hole[:, part.rows, part.columns],
    )
    return canvas, hole, layout


@dataclass(frozen=True)
class _Axis:
    """One axis of a canvas, in pixels: `cut` pixels of the source are dropped and `kept` kept.

    They start at `start`; the `asked` pixels of the finished image start at `outside`.
    """

    canvas: int
    cut: int
    kept: int
    start: int
    asked: int
    outside: int
    grows: tuple[bool, bool]

    def ramp(self, overlap: float, feather: int, side: str) -> Tensor:
        """The mask along this axis [canvas]: 1 outside the image, its edge faded where the side grows.

        Raises ValueError for an overlap that leaves nothing.
        """
        fraction = 0 < overlap < 1
        deep = math.floor(overlap * self.kept + 1e-9) if fraction else inputs.whole_number(overlap, "overlap")
        if deep * sum(self.grows) >= self.kept and any(self.grows):
            raise ValueError(
                f"overlap is {overlap} but the image's {side} is {self.kept}: nothing of it would stay,"
                " use less."
            )
        place = torch.arange(self.canvas, dtype=torch.float32) - self.start
        mask = ((place < 0) | (place >= self.kept)).float()
        # ComfyUI measures from the first pixel of the left edge, but from beyond the last one of the right.
        for grows, depth, beyond in zip(self.grows, (place, self.kept - place), (0, 1), strict=True):
            if grows:
                inside = depth - deep
                mask = torch.maximum(mask, (inside < beyond).float())
                if feather:
                    fade = ((feather - inside) / feather).clamp(0, 1).square()
                    mask = torch.maximum(mask, torch.where(inside >= beyond, fade, 0))
        return mask


def _make_axis(names: tuple[str, str], amounts: dict[str, int], length: int, multiple: int) -> _Axis:
    before, after = (amounts[name] for name in names)
    kept = length + min(before, 0) + min(after, 0)
    if kept < 1:
        raise ValueError(
            f"{names[0]} is {before} and {names[1]} is {after} px but the image has {length} there:"
            " nothing of it would be left, crop less."
        )
    asked = length + before + after
    extra = -asked % multiple
    growth = max(before, 0), max(after, 0)
    outside = extra * growth[0] // sum(growth) if any(growth) else 0
    return _Axis(
        canvas=asked + extra,
        cut=max(-before, 0),
        kept=kept,
        start=outside + growth[0],
        asked=asked,
        outside=outside,
        grows=(growth[0] > 0, growth[1] > 0),
    )
