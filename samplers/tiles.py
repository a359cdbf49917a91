"""Sampling a large canvas window by window: which windows in which order, and the loop over them.

Everything is in latent cells, and nothing is known here of models: a callable paints one window. Memory
beyond the canvas itself is that of one window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ORDERS = ("outward", "glid")
KNOWN = ("keep", "overwrite")
WINDOW, STRIDE = 64, 32  # cells: 512 px, as SD1.5 and glid were trained; stride is half of it


@dataclass(frozen=True)
class Tile:
    """A window of the canvas in cells, and how many of its cells are known when its turn comes."""

    x: int
    y: int
    width: int
    height: int
    known: int

    @property
    def rows(self) -> slice:
        """The rows of the canvas that it covers."""
        return slice(self.y, self.y + self.height)

    @property
    def columns(self) -> slice:
        """The columns of the canvas that it covers."""
        return slice(self.x, self.x + self.width)


def plan(
    unknown: Tensor, *, window: int = WINDOW, stride: int = STRIDE, order: str = "outward"
) -> list[Tile]:
    """The windows that together cover every unknown cell of `unknown`, bool [h,w], in sampling order.

    - `outward`: always the window with the most known cells among those that hold an unknown one, on a grid
      of `stride` cells; none is without known cells as long as the canvas has any.
    - `glid`: row by row from the corner of the unknown cells' bounding box, as glid-3-xl-stable does.

    A window is cut down to a canvas that is narrower or lower than it. Raises ValueError for an empty mask, a
    stride above the window, and a window larger than the canvas both ways (there is nothing to tile).
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}: choose one of {', '.join(ORDERS)}.")
    unknown = _as_cells(unknown)
    height, width = unknown.shape
    for name, value, least, most in (("window", window, 2, None), ("stride", stride, 1, window)):
        if value != int(value) or value < least or (most is not None and value > most):
            span = f"of {least} to {most}" if most else f"from {least} on"
            raise ValueError(f"{name} is {value}: give a whole number {span}, in latent cells of 8 px.")
    if window > height and window > width:
        raise ValueError(
            f"window is {window} cells but the canvas is only {width}x{height}: use a window of at most"
            f" {max(width, height)}, or sample the canvas as a whole."
        )
    size = (min(int(window), height), min(int(window), width))
    walk = _glid_order if order == "glid" else _outward_order
    return walk(unknown.clone(), size, int(window), int(stride))


def _as_cells(unknown: Tensor) -> Tensor:
    """bool [h,w] on the CPU, from that shape or with leading axes of 1."""
    if not isinstance(unknown, Tensor) or unknown.ndim < 2 or unknown.numel() == 0:
        raise ValueError("unknown is not a mask: give bool [height, width] in latent cells, True = unknown.")
    if unknown.shape[:-2].numel() != 1:
        raise ValueError(
            f"unknown has shape {tuple(unknown.shape)}: a batch has one plan, give [height, width]."
        )
    if unknown.dtype.is_floating_point:
        if not bool(torch.isfinite(unknown).all()):
            raise ValueError("unknown holds NaN: give bool [height, width], True = unknown.")
        unknown = unknown >= 0.5
    unknown = unknown.bool().reshape(unknown.shape[-2:]).cpu()
    if not bool(unknown.any()):
        raise ValueError("unknown is empty (no cell is True): there is nothing to sample, mark the hole.")
    return unknown


def _take(unknown: Tensor, y: int, x: int, size: tuple[int, int]) -> Tile:
    """The tile there; its cells count as known from now on."""
    part = unknown[y : y + size[0], x : x + size[1]]
    tile = Tile(x=x, y=y, width=size[1], height=size[0], known=part.numel() - int(part.sum()))
    part.fill_(False)
    return tile


def _glid_order(unknown: Tensor, size: tuple[int, int], window: int, stride: int) -> list[Tile]:
    rows, columns = (unknown.any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
    starts = [_glid_starts(line[0], line[-1] + 1, window, stride) for line in (rows, columns)]
    tiles = []
    for y in starts[0]:
        for x in starts[1]:
            if bool(unknown[y : y + size[0], x : x + size[1]].any()):
                tiles.append(_take(unknown, y, x, size))
    return tiles


def _glid_starts(first: int, end: int, window: int, stride: int) -> list[int]:
    """Along one axis of the bounding box, clamped to the box's end, then to the canvas' beginning."""
    count = max(1, -(-(end - first - (window - stride)) // stride))
    return [max(min(first + stride * i, end - window), 0) for i in range(count)]


def _outward_order(unknown: Tensor, size: tuple[int, int], window: int, stride: int) -> list[Tile]:
    height, width = unknown.shape
    ys, xs = (_grid(length, side, stride) for length, side in ((height, size[0]), (width, size[1])))
    area = size[0] * size[1]
    tiles = []
    while bool(unknown.any()):
        holes = _window_sums(unknown, size)
        known = torch.where(holes > 0, area - holes, -1)
        on_grid = known[ys][:, xs]
        best = int(on_grid.argmax())
        y, x = int(ys[best // len(xs)]), int(xs[best % len(xs)])
        if int(known[y, x]) <= 0 and int(known.max()) > 0:
            # Off the grid: windows side by side can all be either known or unknown throughout.
            y, x = divmod(int(torch.where(known > 0, holes, -1).argmax()), known.shape[1])
        tiles.append(_take(unknown, y, x, size))
    return tiles


def _grid(length: int, side: int, stride: int) -> Tensor:
    """Window positions every `stride` cells, the last clamped to the canvas."""
    places = list(range(0, length - side + 1, stride))
    return torch.tensor(places if places[-1] == length - side else [*places, length - side])


def _window_sums(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """How many cells are True in the window at each position, by a summed-area table."""
    table = F.pad(cells.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    below, above = table[size[0] :], table[: -size[0]]
    return below[:, size[1] :] - below[:, : -size[1]] - above[:, size[1] :] + above[:, : -size[1]]


Painter = Callable[[Tensor, Tensor, Tensor, Tile], Tensor]
Callback = Callable[[int, int, Tensor], None]


@torch.no_grad()
def sample(
    paint: Painter,
    canvas: Tensor,
    unknown: Tensor,
    tiles: list[Tile],
    *,
    known: str = "keep",
    blend: int = 0,
    seed: int = 0,
    noise: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Paint the tiles one after the other; the canvas [B,C,h,w] with every cell known.

    - `paint(context, unknown, noise, tile)`: samples one window. context [B,C,th,tw] is what is known so far,
      exact zeros elsewhere; unknown is bool [th,tw]; noise is the window's part of one field for the whole
      canvas, drawn from `seed` on the CPU, so a cell's noise does not depend on the tiles. To stop, raise.
    - `known`: `keep` returns known cells bit for bit; `overwrite` takes the window whole, as glid does.
    - `blend`: cells over which a tile fades into cells that earlier tiles painted (with `overwrite`: into all
      known cells, from the window's rim inwards).
    - `callback(index, count, canvas)` after each tile, the canvas as it is then.
    """
    if known not in KNOWN:
        raise ValueError(f"known is {known!r}: choose one of {', '.join(KNOWN)}.")
    if blend != int(blend) or blend < 0:
        raise ValueError(f"blend is {blend}: give a whole number of cells from 0 on.")
    missing = _as_cells(unknown).clone()
    if canvas.ndim != 4 or tuple(canvas.shape[2:]) != tuple(missing.shape):
        raise ValueError(
            f"canvas has shape {tuple(canvas.shape)} but unknown is {missing.shape[1]}x{missing.shape[0]}"
            " cells: give latents [batch, channels, height, width] of that size."
        )
    if noise is None:
        noise = torch.randn(canvas.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    given = ~missing
    result = torch.where(missing.to(canvas.device), 0, canvas)
    for index, tile in enumerate(tiles):
        at = (slice(None), slice(None), tile.rows, tile.columns)
        hole = missing[tile.rows, tile.columns]
        context = result[at].clone()
        painted = paint(context, hole.to(canvas.device), noise[at].to(canvas), tile).to(result)
        if painted.shape != context.shape:
            raise ValueError(
                f"paint gave {tuple(painted.shape)} for a window of {tuple(context.shape)}: they must match."
            )
        if known == "keep":
            share = _share_kept(hole, given[tile.rows, tile.columns], int(blend))
        else:
            share = _share_overwritten(hole, tile, missing.shape, int(blend))
        result[at] = torch.lerp(context, painted, share.to(result).expand_as(context))
        missing[tile.rows, tile.columns] = False
        if callback is not None:
            callback(index, len(tiles), result)
    return result


def _share_kept(hole: Tensor, given: Tensor, blend: int) -> Tensor:
    """The tile's weight [h,w]: 1 in the hole, fading over painted cells, 0 on given ones."""
    share = hole.float()
    reached = share[None]
    for step in range(1, blend + 1):
        reached = F.max_pool2d(reached, 3, 1, 1)
        share = torch.maximum(share, reached[0] * (1 - step / (blend + 1)))
    return share.masked_fill(given, 0)


def _share_overwritten(hole: Tensor, tile: Tile, size, blend: int) -> Tensor:
    """The tile's weight [h,w]: 1, but rising from the rim over known cells where the canvas goes on."""
    height, width = hole.shape
    rise = torch.ones(height, width)
    if blend:
        down, across = torch.arange(height)[:, None] + 1.0, torch.arange(width)[None] + 1.0
        for depth, inner in (
            (down, tile.y > 0),
            (height + 1 - down, tile.y + height < size[0]),
            (across, tile.x > 0),
            (width + 1 - across, tile.x + width < size[1]),
        ):
            if inner:
                rise = torch.minimum(rise, depth / (blend + 1))
    return torch.where(hole, 1.0, rise.clamp(max=1))
