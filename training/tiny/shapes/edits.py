"""Edits of the shapes world: what is asked, in which words, and what the result must be."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from .scenes import (
    COLOURS,
    KINDS,
    PLACES,
    SIZE_NAMES,
    Scene,
    Shape,
    check_split,
    ordered,
    place_masks,
    random_scene,
    render_many,
)

OPERATIONS = ("recolour", "replace", "remove", "add", "move", "background")
WORDINGS = {
    "recolour": (
        "make the {old} {new_colour}",
        "turn the {old} {new_colour}",
        "paint the {old} {new_colour}",
        "change the colour of the {old} to {new_colour}",
    ),
    "replace": (
        "replace the {old} with a {new_kind}",
        "turn the {old} into a {new_kind}",
        "swap the {old} for a {new_kind}",
        "change the {old} to a {new_kind}",
    ),
    "remove": ("remove the {old}", "delete the {old}", "erase the {old}", "take away the {old}"),
    "add": (
        "add a {new} at the {place}",
        "put a {new} at the {place}",
        "draw a {new} in the {place}",
        "place a {new} in the {place}",
    ),
    "move": (
        "move the {old} to the {place}",
        "shift the {old} to the {place}",
        "bring the {old} to the {place}",
        "put the {old} at the {place}",
    ),
    "background": (
        "change the background to {new_colour}",
        "make the background {new_colour}",
        "paint the background {new_colour}",
        "give it a {new_colour} background",
    ),
}


class Edit(NamedTuple):
    """An edit before it is drawn."""

    operation: str
    source: Scene
    target: Scene
    instruction: str

    @property
    def places(self) -> tuple[str, ...]:
        """The quadrants that the edit touches; all of them when the background changes."""
        if self.source.background != self.target.background:
            return PLACES
        return tuple(p for p in PLACES if self.source.at(p) != self.target.at(p))


class EditPair(NamedTuple):
    """A drawn edit: images float32 `[H,W,3]` in 0..1, mask float32 `[H,W]` (1 = touched by the edit)."""

    source: Tensor
    target: Tensor
    instruction: str
    mask: Tensor
    caption: str
    edit: Edit


def _edit_of(rng: random.Random, operation: str, source: Scene) -> Edit | None:
    """One random edit of `source`, or None where the operation is impossible there."""
    shapes, words = list(source.shapes), {}
    index = rng.randrange(len(shapes))
    old = shapes[index]
    free_colours = [c for c in COLOURS if c != source.background and c not in {s.colour for s in shapes}]
    free_places = [p for p in PLACES if source.at(p) is None]
    background = source.background
    words["old"] = old.name
    if operation == "recolour":
        shapes[index] = replace(old, colour=rng.choice(free_colours))
        words["new_colour"] = shapes[index].colour
    elif operation == "replace":
        shapes[index] = replace(old, kind=rng.choice([k for k in KINDS if k != old.kind]))
        words["new_kind"] = shapes[index].kind
    elif operation == "remove":
        if len(shapes) == 1:
            return None
        del shapes[index]
    elif operation == "add":
        if len(shapes) == 3:
            return None
        new = Shape(
            rng.choice(KINDS), rng.choice(free_colours), rng.choice(SIZE_NAMES), rng.choice(free_places)
        )
        shapes.append(new)
        words.update(new=f"{new.size} {new.name}", place=new.place)
    elif operation == "move":
        shapes[index] = replace(old, place=rng.choice(free_places))
        words["place"] = shapes[index].place
    elif operation == "background":
        background = rng.choice(free_colours)
        words["new_colour"] = background
    else:
        raise ValueError(f"operation is {operation!r}: use one of {', '.join(OPERATIONS)}")
    instruction = rng.choice(WORDINGS[operation]).format(**words)
    return Edit(operation, source, ordered(background, shapes), instruction)


def random_edits(
    seed: int,
    n: int,
    split: str = "train",
    operations: Sequence[str] = OPERATIONS,
    *,
    single: bool = False,
) -> Iterator[Edit]:
    """`n` edits, operations drawn evenly; source and target both belong to `split`.

    single: sources of one shape, which is never removed. Raises ValueError if nothing else is asked for.
    """
    check_split(split)
    if single:
        operations = [operation for operation in operations if operation != "remove"]
        if not operations:
            raise ValueError(
                "operation is remove, but the image has one shape: choose another, or more shapes"
            )
    rng = random.Random(f"{seed} {split}")
    made = 0
    while made < n:
        operation = rng.choice(tuple(operations))
        edit = None
        while edit is None or edit.target.split != split:
            edit = _edit_of(rng, operation, random_scene(rng, split, single=single))
        made += 1
        yield edit


def edit_pairs(
    seed: int,
    n: int,
    split: str = "train",
    *,
    size: int = 64,
    operations: Sequence[str] = OPERATIONS,
    single: bool = False,
) -> Iterator[EditPair]:
    """`n` drawn edits of `split` ("train", "val" or "test"), the same ones for the same seed everywhere.

    operations, single: see `random_edits`.
    """
    edits = random_edits(seed, n, split, operations, single=single)
    while chunk := [edit for _, edit in zip(range(512), edits, strict=False)]:
        sources = render_many([e.source for e in chunk], size)
        targets = render_many([e.target for e in chunk], size)
        masks = place_masks([e.places for e in chunk], size)
        for edit, source, target, mask in zip(chunk, sources, targets, masks, strict=True):
            yield EditPair(source, target, edit.instruction, mask, edit.target.caption, edit)
