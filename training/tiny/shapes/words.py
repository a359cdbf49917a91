"""Understands an instruction of the shapes world: the edit that it asks for in a given scene.

The inverse of the wordings in `edits.py`, found by writing out every edit of the scene; for judging, not for
training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .edits import WORDINGS, Edit
from .scenes import COLOURS, KINDS, PLACES, SIZES, Scene, Shape, ordered


def understand(source: Scene, instruction: str) -> Edit | None:
    """The edit of `source` that `instruction` names (in any case and spacing), or None if it names none."""
    wanted = " ".join(instruction.lower().split()).rstrip(".")
    for operation, target, words in _edits(source):
        if any(wording.format(**words) == wanted for wording in WORDINGS[operation]):
            return Edit(operation, source, target, wanted)
    return None


def _edits(source: Scene) -> Iterator[tuple[str, Scene, dict[str, str]]]:
    """(operation, resulting scene, words) of every possible edit."""
    shapes = list(source.shapes)
    for colour in COLOURS:
        yield "background", replace(source, background=colour), {"new_colour": colour}
    for index, old in enumerate(shapes):
        rest = shapes[:index] + shapes[index + 1 :]
        words = {"old": old.name}
        yield "remove", ordered(source.background, rest), words
        for colour in COLOURS:
            recoloured = ordered(source.background, [*rest, replace(old, colour=colour)])
            yield "recolour", recoloured, words | {"new_colour": colour}
        for kind in KINDS:
            replaced = ordered(source.background, [*rest, replace(old, kind=kind)])
            yield "replace", replaced, words | {"new_kind": kind}
        for place in PLACES:
            if source.at(place) is None:
                moved = ordered(source.background, [*rest, replace(old, place=place)])
                yield "move", moved, words | {"place": place}
    for place in PLACES:
        if source.at(place) is None:
            for colour in COLOURS:
                for kind in KINDS:
                    for size in SIZES:
                        new = Shape(kind, colour, size, place)
                        words = {"new": f"{size} {new.name}", "place": place}
                        yield "add", ordered(source.background, [*shapes, new]), words
