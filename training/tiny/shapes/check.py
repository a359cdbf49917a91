"""Reads shapes images back and compares them with what they should show.

Each quadrant is compared with every image the world can put there (8 shapes and sizes or nothing, 8
grounds, 8 colours) by least squares in closed form: `|P - R|^2 = |P|^2 - 2 <P, R> + |R|^2` with `R = ground
(1 - c) + colour c`, so that only inner products with the nine coverages c are needed. A quadrant further
than `CELL_TOLERANCE` from all of them is unreadable, and counts as wrong whatever it was to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .edits import Edit
from .scenes import (
    COLOUR_NAMES,
    PLACES,
    TEMPLATES,
    Scene,
    Shape,
    cell_size,
    codes,
    coverage,
    ordered,
    palette,
)

CELL_TOLERANCE = (
    0.012  # mean square error of a quadrant; a small circle drawn as a small square is about 0.01 off
)


class Reading(NamedTuple):
    """What N images show, as `codes` has it, and how far each quadrant is from what it was read as."""

    background: Tensor  # [N]
    template: Tensor  # [N,4], 0 = empty, -1 = unreadable
    colour: Tensor  # [N,4]
    error: Tensor  # [N,4] mean square error

    def matches(self, scenes: Sequence[Scene]) -> Tensor:
        """Bool `[N]`: every quadrant and the background are as in the scene, and nothing else is there."""
        return self.quadrants(scenes).all(1)

    def quadrants(self, scenes: Sequence[Scene]) -> Tensor:
        """Bool `[N,4]`: the quadrant shows what the scene has there, on the scene's background."""
        background, template, colour = codes(scenes)
        same = (self.template == template) & (self.colour == colour)
        return same & (self.background == background)[:, None]

    def scene(self, row: int) -> Scene:
        """Image `row` as a scene; unreadable quadrants are left out."""
        shapes = []
        for place, template, colour in zip(PLACES, self.template[row], self.colour[row], strict=True):
            if template > 0:
                kind, size = TEMPLATES[int(template) - 1]
                shapes.append(Shape(kind, COLOUR_NAMES[int(colour)], size, place))
        return ordered(COLOUR_NAMES[int(self.background[row])], shapes)


class ObjectReport(NamedTuple):
    """One target shape: was any shape found for it, and is it right in kind, colour, size and place."""

    target: Shape
    found: bool
    kind: bool
    colour: bool
    size: bool
    place: bool


class Report(NamedTuple):
    """How an image compares with a scene."""

    objects: tuple[ObjectReport, ...]
    background: bool
    extra: int  # shapes, or unreadable quadrants, that the scene does not have
    score: float  # 0..1; 1 only when everything is right
    untouched_error: (
        float  # mean |image - source| where mask is 0; NaN without a source or an untouched pixel
    )

    @property
    def exact(self) -> bool:
        """Whether everything is right."""
        return self.score == 1.0


@torch.no_grad()
def read(images: Tensor) -> Reading:
    """Reads images, float `[N,H,H,3]` in 0..1. Raises ValueError on another shape."""
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(f"images are {tuple(images.shape)}: shapes images are square, [N,H,H,3]")
    parts = [_read_chunk(chunk) for chunk in images.float().cpu().split(256)]
    return Reading(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _read_chunk(images: Tensor) -> Reading:
    n, cell = len(images), cell_size(images.shape[1])
    cover = coverage(cell).flatten(1)  # t m
    colours = palette()
    cells = images.reshape(n, 2, cell, 2, cell, 3).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, cell * cell, 3)
    on_shape = torch.einsum("npmc,tm->nptc", cells, cover)
    on_ground = cells.sum(2, keepdim=True) - on_shape
    power = cells.square().sum((2, 3))
    product = (on_ground @ colours.T)[..., :, None] + (on_shape @ colours.T)[
        ..., None, :
    ]  # n p t ground colour
    gram = colours @ colours.T
    norms = gram.diagonal()
    own = (
        (1 - cover).square().sum(1)[:, None, None] * norms[:, None]
        + 2 * (cover * (1 - cover)).sum(1)[:, None, None] * gram
        + cover.square().sum(1)[:, None, None] * norms
    )
    error = (power[:, :, None, None, None] - 2 * product + own) / (3 * cell * cell)
    same = torch.eye(len(colours), dtype=torch.bool)
    error[:, :, 1:, same] = torch.inf  # a shape in the ground's colour is the empty quadrant
    best, which = error.permute(0, 1, 3, 2, 4).flatten(3).min(-1)  # n p ground
    background = best.sum(1).argmin(-1)
    row = background[:, None, None].expand(-1, 4, 1)
    best, which = best.gather(2, row).squeeze(2), which.gather(2, row).squeeze(2)
    template = torch.div(which, len(colours), rounding_mode="floor")
    colour = torch.where(template > 0, which % len(colours), 0)
    template = torch.where(best <= CELL_TOLERANCE, template, -1)
    return Reading(background, template, colour, best.clamp_min(0))


def check(image: Tensor, scene: Scene, *, source: Tensor | None = None, mask: Tensor | None = None) -> Report:
    """Compares one image `[H,H,3]` with the scene it should show; see `check_many`."""
    return check_many(
        image[None], [scene], None if source is None else source[None], None if mask is None else mask[None]
    )[0]


def check_many(
    images: Tensor, scenes: Sequence[Scene], sources: Tensor | None = None, masks: Tensor | None = None
) -> list[Report]:
    """One report per image `[N,H,H,3]`; `sources` and `masks` `[N,H,H]` give `untouched_error`.

    The score is the mean of the background (0 or 1), of each target shape (share of kind, colour, size and
    place that is right; 0 if nothing was found for it) and of a 0 for everything that should not be there.
    """
    if len(scenes) != len(images):
        raise ValueError(f"{len(images)} images but {len(scenes)} scenes: give one scene per image")
    reading = read(images)
    reports = []
    for row, scene in enumerate(scenes):
        error = float("nan")
        if sources is not None:
            keep = torch.ones(images.shape[1:3]) if masks is None else 1 - masks[row]
            difference = (images[row] - sources[row]).abs().mean(-1)
            error = ((difference * keep).sum() / keep.sum()).item() if keep.sum() > 0 else error
        unreadable = int((reading.template[row] < 0).sum())
        reports.append(_report(reading.scene(row), scene, unreadable, error))
    return reports


def _report(seen: Scene, target: Scene, unreadable: int, error: float) -> Report:
    left = list(seen.shapes)
    objects = {}
    for exact_place in (
        True,
        False,
    ):  # what stands at the right place is taken first, then look-alikes elsewhere
        for shape in target.shapes:
            if shape in objects:
                continue
            found = seen.at(shape.place) if exact_place else None
            if not exact_place:
                found = next((s for s in left if s.name == shape.name), None)
            if found in left:
                left.remove(found)
                objects[shape] = _compare(found, shape)
    rows = tuple(objects.get(s, ObjectReport(s, False, False, False, False, False)) for s in target.shapes)
    missing_in_unreadable = sum(not r.found for r in rows)
    extra = len(left) + max(0, unreadable - missing_in_unreadable)
    background = seen.background == target.background
    points = background + sum((r.kind + r.colour + r.size + r.place) / 4 for r in rows)
    return Report(rows, background, extra, points / (1 + len(rows) + extra), error)


def _compare(found: Shape, target: Shape) -> ObjectReport:
    return ObjectReport(
        target,
        True,
        found.kind == target.kind,
        found.colour == target.colour,
        found.size == target.size,
        found.place == target.place,
    )


def places_match(images: Tensor, scenes: Sequence[Scene], places: Sequence[Sequence[str]]) -> Tensor:
    """Bool `[N]`: the named quadrants show what the scene has there (a Fill model's caption accuracy)."""
    asked = torch.tensor([[p in row for p in PLACES] for row in places])
    return (read(images).quadrants(scenes) | ~asked).all(1)


def edit_success(images: Tensor, edits: Sequence[Edit]) -> dict[str, Tensor]:
    """Bool `[N]` each: `made` (what was asked is there), `kept` (all else is as it was), `success` (both).

    A changed background has to reach every quadrant to be made; the shapes on it have to stay to be kept.
    """
    reading, targets = read(images), [e.target for e in edits]
    background, template, colour = codes(targets)
    ground = reading.background == background
    shape = (reading.template == template) & (reading.colour == colour)
    touched = torch.tensor([[p in e.places for p in PLACES] for e in edits])
    recoloured = torch.tensor([e.operation == "background" for e in edits])
    made = torch.where(recoloured, ground, (shape | ~touched).all(1))
    kept = torch.where(recoloured, shape.all(1), (shape | touched).all(1) & ground)
    return {"made": made, "kept": kept, "success": made & kept}
