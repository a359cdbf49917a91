"""Fills that continue the image: its edge, its mirror image, or mosaic tiles of the mirror image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry import Box
from .inputs import whole_number

FAR = 1 << 20  # pixels; farther than any canvas is wide


def edge(image: Tensor, mask: Tensor) -> Tensor:
    """Each unknown pixel of [B,H,W,3] is its nearest known one; around a rectangle, its edge repeated."""
    return _each(image, mask, lambda inside, known: inside[nearest(known)], _clamped)


def mirror(image: Tensor, mask: Tensor) -> Tensor:
    """Each unknown pixel of [B,H,W,3] is the known one as far behind the edge as it is before it."""
    return _each(image, mask, _reflected, _folded)


def mosaic(image: Tensor, mask: Tensor, short: int = 3, long: int = 24, tile: int = 16) -> Tensor:
    """The mirror image [B,H,W,3], stretched away from the edge, in `short` x `long` tiles along each side.

    Corners get (short + long) // 2 tiles each way. Holes inside the image become squares of `tile` px. The
    stretch shows a quarter of the depth, as sd-webui-mosaic-outpaint's defaults do (area 0.5, ratio 2).
    """
    short, long, tile = (
        whole_number(value, name, 1) for value, name in ((short, "short"), (long, "long"), (tile, "tile"))
    )
    filled = mirror(image, mask)
    for item, hole in zip(filled, mask, strict=True):
        box = _known_box(hole < 0.5)
        inside = item[box.rows, box.columns]
        blocks = _tiles(inside, -(-box.height // tile), -(-box.width // tile))
        inside.copy_(torch.where(hole[box.rows, box.columns, None] >= 0.5, blocks, inside))
        _stretch(item, box)
        _tile_around(item, box, short, long)
    return filled


def _each(image: Tensor, mask: Tensor, inner, outer) -> Tensor:
    """Fill holes inside each item's known rectangle by `inner`, then all around it by `outer`'s indices."""
    items = []
    for item, hole in zip(image, mask, strict=True):
        known = hole < 0.5
        box = _known_box(known)
        inside, known = item[box.rows, box.columns], known[box.rows, box.columns]
        if not bool(known.all()):
            inside = inner(inside, known)
        rows = outer(len(item), box.top, box.height, item.device)
        columns = outer(item.shape[1], box.left, box.width, item.device)
        items.append(inside[rows][:, columns])
    return torch.stack(items)


def _known_box(known: Tensor) -> Box:
    """The smallest box around all known pixels of [H,W]; there is at least one."""
    rows, columns = (known.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    return Box(top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left)


def _clamped(length: int, start: int, extent: int, device) -> Tensor:
    return torch.arange(length, device=device).sub_(start).clamp_(0, extent - 1)


def _folded(length: int, start: int, extent: int, device) -> Tensor:
    place = torch.arange(length, device=device).sub_(start) % (2 * extent)
    return torch.minimum(place, 2 * extent - 1 - place)


def _reflected(inside: Tensor, known: Tensor) -> Tensor:
    """Point reflection at the nearest known pixel; that pixel itself where this hits no known one."""
    rows, columns = nearest(known)
    height, width = known.shape
    here = torch.arange(height, device=known.device)[:, None], torch.arange(width, device=known.device)[None]
    beyond = [2 * at - own - (at - own).sign() for at, own in zip((rows, columns), here, strict=True)]
    in_reach = (beyond[0] >= 0) & (beyond[0] < height) & (beyond[1] >= 0) & (beyond[1] < width)
    beyond = [place.clamp(0, size - 1) for place, size in zip(beyond, (height, width), strict=True)]
    use = in_reach & known[beyond[0], beyond[1]]
    return inside[torch.where(use, beyond[0], rows), torch.where(use, beyond[1], columns)]


def nearest(known: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) [H,W] of the nearest known pixel of [H,W] bool, which has at least one.

    The exact distance transform of Felzenszwalb and Huttenlocher (2012): down the columns by two scans, then
    along the rows by the lower envelope of parabolas, all rows at once.
    """
    height, width = known.shape
    rows = torch.arange(height, device=known.device)[:, None].expand(height, width)
    above = torch.where(known, rows, -FAR).cummax(dim=0).values
    below = torch.where(known, rows, FAR).flip(0).cummin(dim=0).values.flip(0)
    at_row = torch.where(rows - above <= below - rows, above, below)
    at_column = _lowest_parabola((rows - at_row) ** 2)
    return at_row.gather(1, at_column), at_column


def _lowest_parabola(base: Tensor) -> Tensor:
    """The q at which base[:, q] + (x - q)^2 is lowest, for every x: [H,W] int64 of [H,W] int64."""
    height, width = base.shape
    sites = base.new_zeros(height, width)  # of each row's envelope, from left to right,
    begins = base.new_full((height, width), FAR)  # and the first x that each of them rules
    begins[:, 0] = -FAR
    last = base.new_zeros(height, 1)
    for site in range(1, width):
        while True:
            rival = sites.gather(1, last)
            higher = base[:, site : site + 1] - base.gather(1, rival) + site**2 - rival**2
            begin = (higher.div(2 * (site - rival), rounding_mode="floor") + 1).clamp(-FAR + 1, FAR)
            beaten = begin <= begins.gather(1, last)
            if not bool(beaten.any()):
                break
            last = last - beaten.long()
        rules = begin < width
        last = last + rules.long()
        sites.scatter_(1, last, torch.where(rules, site, sites.gather(1, last)))
        begins.scatter_(1, last, torch.where(rules, begin, begins.gather(1, last)))
    begins = torch.where(torch.arange(width, device=base.device) > last, FAR, begins)
    columns = torch.arange(width, device=base.device).expand(height, width).contiguous()
    return sites.gather(1, torch.searchsorted(begins, columns, right=True) - 1)


def _resized(image: Tensor, height: int, width: int, mode: str) -> Tensor:
    """[h,w,C] resized without antialiasing."""
    corners = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(image.movedim(-1, 0)[None], (height, width), mode=mode, **corners)[0].movedim(0, -1)


def _tiles(image: Tensor, down: int, across: int) -> Tensor:
    """[h,w,C] as flat tiles, each the mean of its pixels."""
    height, width = image.shape[:2]
    small = _resized(image, min(down, height), min(across, width), "area")
    return _resized(small, height, width, "nearest-exact")


def _stretch(item: Tensor, box: Box) -> None:
    """Stretch the new area away from the box fourfold: left and right first, then above and below."""
    for plane, start, extent in (
        (item, box.left, box.width),
        (item.transpose(0, 1), box.top, box.height),
    ):
        before, after = plane[:, :start], plane[:, start + extent :]
        if before.numel():
            before.copy_(_stretched(before.flip(1)).flip(1))
        if after.numel():
            after.copy_(_stretched(after))


def _stretched(area: Tensor) -> Tensor:
    """The half of [h,w,C] next to its left edge, stretched to twice the width, of which the first w show."""
    height, width = area.shape[:2]
    return _resized(area[:, : max(width // 2, 1)], height, 2 * width, "bilinear")[:, :width]


def _tile_around(item: Tensor, box: Box, short: int, long: int) -> None:
    """Tile the four sides and four corners around the box."""
    corner = (short + long) // 2
    right, bottom = box.left + box.width, box.top + box.height
    bands = (slice(0, box.top), slice(box.top, bottom), slice(bottom, len(item)))
    strips = (slice(0, box.left), slice(box.left, right), slice(right, item.shape[1]))
    for i, rows in enumerate(bands):
        for j, columns in enumerate(strips):
            area = item[rows, columns]
            if (i, j) == (1, 1) or area.numel() == 0:
                continue
            counts = (corner, corner) if i != 1 and j != 1 else (short, long) if i != 1 else (long, short)
            area.copy_(_tiles(area, *counts))
