"""Where webui's two outpainting scripts sample: the geometry of mk2's passes and of poor man's tiles.

Whole numbers only, no tensors: which window of which canvas, and what of it is kept. Sizes are
(height, width) in pixels. How a window is painted stands in `methods.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..geometry import Box

ROUNDED = 64  # both scripts bring an axis that grows to a multiple of this
SIDES = ("left", "right", "top", "bottom")  # in the order of mk2's passes

Sides = dict[str, int]


def rounded(sides: Sides, size: tuple[int, int]) -> Sides:
    """The amounts that bring each axis that grows to a multiple of 64, shared as they were asked for.

    An axis that does not grow keeps its length, also for poor man's script, which rounds it, adding black
    rows that are kept.
    """
    left, right = _rounded(sides["left"], sides["right"], size[1])
    top, bottom = _rounded(sides["top"], sides["bottom"], size[0])
    return {"left": left, "right": right, "top": top, "bottom": bottom}


def _rounded(before: int, after: int, length: int) -> tuple[int, int]:
    if not before + after:
        return 0, 0
    growth = _up(length + before + after) - length
    first = before * growth // (before + after)
    return first, growth - first


def _up(length: int) -> int:
    return math.ceil(length / ROUNDED) * ROUNDED


@dataclass(frozen=True)
class Mk2Pass:
    """One side of mk2: the image lies at `placed` of a canvas, black elsewhere, of which `window` is painted.

    `size` is that of the image afterwards. `keep` (canvas) and `keep_latent` (window) are not repainted.
    """

    side: str
    size: tuple[int, int]
    canvas: tuple[int, int]
    placed: Box
    window: Box
    keep: Box
    keep_latent: Box


def mk2_passes(size: tuple[int, int], sides: Sides, window: int = 512, mask_blur: int = 8) -> list[Mk2Pass]:
    """The passes of Outpainting mk2, one after another for each side that grows.

    `window`: the most that a pass paints along its own axis; the other axis is painted whole. `mask_blur`: px
    of the image beside the new part that are filled as well (of its latents twice as many).
    """
    grown = rounded(sides, size)
    passes = []
    for side in SIDES:
        if grown[side]:
            passes.append(_mk2_pass(size, side, grown[side], window, mask_blur))
            size = passes[-1].size
    return passes


def _mk2_pass(size: tuple[int, int], side: str, amount: int, window: int, blur: int) -> Mk2Pass:
    axis = int(side in ("left", "right"))
    after = tuple(length + amount * (place == axis) for place, length in enumerate(size))
    canvas = tuple(map(_up, after))
    first = side in ("left", "top")  # the new part comes before the image
    lengths, starts = list(canvas), [0, 0]
    lengths[axis] = min(window, canvas[axis])
    starts[axis] = 0 if first else canvas[axis] - lengths[axis]

    def kept(whole: tuple[int, int], inset: int) -> Box:
        """Up to and with its last row and column, as PIL draws rectangles."""
        begin, end = [0, 0], [length + 1 for length in after]
        if first:
            begin[axis] = amount + inset
        else:
            end[axis] = whole[axis] - amount - inset + 1
        end = [min(stop, length) for stop, length in zip(end, whole, strict=True)]
        height, width = (max(stop - start, 0) for start, stop in zip(begin, end, strict=True))
        return Box(*begin, height, width)

    at = [amount if first and place == axis else 0 for place in (0, 1)]
    return Mk2Pass(
        side=side,
        size=after,
        canvas=canvas,
        placed=Box(*at, *size),
        window=Box(*starts, *lengths),
        keep=kept(canvas, blur),
        keep_latent=kept(tuple(lengths), 2 * blur),
    )


@dataclass(frozen=True)
class PoorMansPlan:
    """Poor man's outpainting: the image at `placed` of a canvas, its tiles in order, and what is kept.

    `tiles` cover the canvas, `overlap` px of each faded over the ones before; those inside the image are not
    painted (`painted` lists the others). `keep` and `keep_latent` are not repainted.
    """

    canvas: tuple[int, int]
    placed: Box
    tiles: tuple[Box, ...]
    overlap: int
    keep: Box
    keep_latent: Box

    @property
    def painted(self) -> tuple[Box, ...]:
        """The tiles that hold something new."""
        at = self.placed
        return tuple(
            tile
            for tile in self.tiles
            if tile.left < at.left
            or tile.left + tile.width > at.left + at.width
            or tile.top < at.top
            or tile.top + tile.height > at.top + at.height
        )


def poor_mans_plan(
    size: tuple[int, int], sides: Sides, window: int = 512, mask_blur: int = 4
) -> PoorMansPlan:
    """All sides at once, in tiles of `window` px (cut down to the canvas) that overlap by the largest amount.

    The overlap is at most half a tile, where webui divides by zero or runs backwards.
    """
    grown = rounded(sides, size)
    canvas = (size[0] + grown["top"] + grown["bottom"], size[1] + grown["left"] + grown["right"])
    tile = min(window, canvas[0]), min(window, canvas[1])
    overlap = min(max(sides.values()), min(tile) // 2)
    starts = [_starts(length, part, overlap) for length, part in zip(canvas, tile, strict=True)]

    def kept(inset: int) -> Box:
        """As in mk2: up to and with the last row and column, black over the image's inside."""
        begin = [grown[side] + inset * (grown[side] > 0) for side in ("top", "left")]
        end = [
            min(length - grown[side] - inset * (grown[side] > 0) + 1, length)
            for length, side in zip(canvas, ("bottom", "right"), strict=True)
        ]
        return Box(*begin, max(end[0] - begin[0], 0), max(end[1] - begin[1], 0))

    return PoorMansPlan(
        canvas=canvas,
        placed=Box(grown["top"], grown["left"], *size),
        tiles=tuple(Box(top, left, *tile) for top in starts[0] for left in starts[1]),
        overlap=overlap,
        keep=kept(2 * mask_blur),
        keep_latent=kept(mask_blur // 2),
    )


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    count = math.ceil((length - overlap) / (tile - overlap))
    step = (length - tile) / (count - 1) if count > 1 else 0
    return [min(int(index * step), length - tile) for index in range(count)]
