"""The way back: what a model painted goes into the image, and every known pixel stays as it was."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import pixels
from ..geometry import Box
from . import inputs
from .canvas import GROUND, CanvasLayout
from .pyramid import push_pull

RING = 16  # pixels around the seam that colours are compared on
CELL = 8  # pixels; the comparison is averaged on a grid of these squares
OUTLIER = 24 / 255  # of a channel; VAEs shift colours by less
SMOOTHING = 64  # rounds on that grid; the pyramid's start is right far away, these are for the seam


def paste_back(
    result: Tensor,
    original: Tensor,
    layout: CanvasLayout,
    mask: Tensor | None = None,
    *,
    feather: int = 0,
    match_colour: bool = False,
    join: bool = False,
) -> Tensor:
    """The finished image [B,H,W,3], or with 4 channels if the original has alpha.

    - `result` [B,h,w,3]: what was made of the canvas (or of the crop) that `layout` came with. One of another
      size but equal aspect is resized.
    - `original` [B,H,W,C]: the image that `expand` or `crop_context` was given.
    - `mask`: 1 = taken from the result, in the size of the finished image, of the canvas, or of the
      original; by default the one of the layout. Where it is 0 the original returns bit for bit.
    - `feather`: px of known image next to the mask over which the result fades out.
    - `match_colour`: correct the result's colours by its difference to the original around the mask, smoothly
      continued inwards; the model must have shown the surroundings again, as Fill and Kontext do.
    - `join`: all items go into one image, in order, instead of one image each.

    Raises ValueError in one sentence for what does not fit together.
    """
    if not isinstance(layout, CanvasLayout):
        raise ValueError("layout is missing: connect the layout that came with the canvas or the crop.")
    feather = inputs.whole_number(feather, "feather")
    result = _as_canvas(inputs.checked(result, "result"), layout)
    original = inputs.checked(original, "original").to(result.device)
    if tuple(original.shape[1:3]) != layout.source_size:
        raise ValueError(
            f"original is {original.shape[2]}x{original.shape[1]} but the layout was made for"
            f" {layout.source_size[1]}x{layout.source_size[0]}: connect the image that it was made from."
        )
    weight = finished_mask(mask, layout).to(result.device)
    if feather:
        away = pixels.distance((weight > 0).float(), feather)
        weight = torch.maximum(weight, 1 - away / (feather + 1)).clamp_(0, 1)
        weight[away > feather] = 0
    count = max(len(result), len(weight), 1 if join else len(original))
    if join and len(original) > 1:
        raise ValueError(f"original has {len(original)} items: join puts all into one image, give one.")
    finished = pixels.repeat_batch(_lay(original, layout), 1 if join else count).clone()
    for item in range(count):
        spot = layout.spots[item % len(layout.spots)]
        patch = pixels.resize_image(result[item % len(result)][None], spot.height, spot.width)[0]
        part = finished[0 if join else item, spot.rows, spot.columns, :3]
        share = weight[item % len(weight), spot.rows, spot.columns]
        if match_colour:
            patch = matched(patch, part, share)
        part.copy_(torch.lerp(part, patch.to(part), share[..., None].to(part).expand_as(part)))
    return finished


def finished_mask(mask: Tensor | None, layout: CanvasLayout) -> Tensor:
    """The mask [B,H,W] in the finished image's size; 1 wherever the original has nothing to give.

    Raises ValueError for a mask of no known size.
    """
    if mask is None:
        if layout.mask is None:
            raise ValueError("mask is missing: connect the one that came with the layout.")
        return layout.mask
    mask = pixels.as_mask(mask)
    size = tuple(mask.shape[1:])
    whole = torch.ones((len(mask), *layout.finished_size), device=mask.device)
    at = layout.placed
    if size == layout.finished_size:
        inside = mask[:, at.rows, at.columns]
    elif size == layout.canvas_size:
        return _mask_of_canvas(mask, layout)
    elif size == layout.source_size:
        inside = mask[:, layout.shown.rows, layout.shown.columns]
    else:
        sizes = (layout.finished_size, layout.canvas_size, layout.source_size)
        known = ", ".join(dict.fromkeys(f"{width}x{height}" for height, width in sizes))
        raise ValueError(f"mask is {size[1]}x{size[0]} but the layout knows {known}: connect its own mask.")
    whole[:, at.rows, at.columns] = inside
    return whole


def _mask_of_canvas(mask: Tensor, layout: CanvasLayout) -> Tensor:
    count = max(len(mask), len(layout.spots))
    whole = torch.zeros((count, *layout.finished_size), device=mask.device)
    part = mask[:, layout.part.rows, layout.part.columns]
    for item in range(count):
        spot = layout.spots[item % len(layout.spots)]
        resized = pixels.smooth_resize(part[item % len(part)][None], spot.height, spot.width)
        whole[item, spot.rows, spot.columns] = resized[0]
    return whole


def _as_canvas(result: Tensor, layout: CanvasLayout) -> Tensor:
    """The part of the result [B,h,w,3] that belongs to the image, at the result's own scale."""
    size = tuple(result.shape[1:3])
    part = layout.part
    if size != layout.canvas_size:
        height, width = layout.canvas_size
        if not 0.98 < size[1] * height / (size[0] * width) < 1.02:
            raise ValueError(
                f"result is {size[1]}x{size[0]} but its canvas was {width}x{height}: connect what was made"
                " from this canvas."
            )
        part = part.scaled(layout.canvas_size, size)
    return pixels.rgb(result)[:, part.rows, part.columns]


def _lay(original: Tensor, layout: CanvasLayout) -> Tensor:
    """The original at its place in the finished image, new area gray and opaque."""
    shown = original[:, layout.shown.rows, layout.shown.columns]
    shown = shown if shown.shape[-1] == 4 else pixels.rgb(shown)
    if layout.placed == Box(0, 0, *layout.finished_size):
        return shown
    whole = shown.new_full((len(shown), *layout.finished_size, shown.shape[-1]), GROUND)
    whole[..., 3:] = 1
    whole[:, layout.placed.rows, layout.placed.columns] = shown
    return whole


def matched(patch: Tensor, original: Tensor, weight: Tensor) -> Tensor:
    """The patch [h,w,3] with its colours moved to meet the original's along the edge of `weight` [h,w].

    The difference is averaged over squares of a ring of known pixels and continued smoothly everywhere else.
    Where it is far from its median the model drew something else, which says nothing of its colours.
    """
    known = weight <= 0
    ring = known & (pixels.distance((~known).float()[None], RING)[0] <= RING)
    if not bool(ring.any()):
        return patch
    difference = original.to(patch) - patch
    usual = difference[ring].median(dim=0).values
    ring = ring & ((difference - usual).abs().amax(dim=-1) <= OUTLIER)
    share = ring.to(patch)[None, None]
    height, width = weight.shape
    padding = (0, -width % CELL, 0, -height % CELL)
    planes = difference.movedim(-1, 0)[None] * share
    total, share = (F.avg_pool2d(F.pad(plane, padding), CELL) for plane in (planes, share))
    offset = _membrane(total / share.clamp(min=1e-12), share > 0)
    offset = F.interpolate(offset, scale_factor=CELL, mode="bilinear", align_corners=False)
    return (patch + offset[0, :, :height, :width].movedim(0, -1)).clamp(0, 1)


def _membrane(values: Tensor, known: Tensor) -> Tensor:
    """values [B,C,h,w] where known, elsewhere nearly the harmonic surface through them, free at the frame."""
    surface = push_pull(values, known.to(values))
    for _ in range(SMOOTHING):
        around = F.pad(surface, (1, 1, 1, 1), mode="replicate")
        around = (
            around[..., :-2, 1:-1] + around[..., 2:, 1:-1] + around[..., 1:-1, :-2] + around[..., 1:-1, 2:]
        )
        surface = torch.where(known, values, around / 4)
    return surface
