"""What a Fill base knows before any instruction: captioned images and diptychs with holes, copies."""

from __future__ import annotations

import random
from typing import NamedTuple

from ....models.prompt import ICEDIT_TEMPLATE
from .edits import Edit
from .scenes import PLACES, Scene

DIPTYCH_PROMPT = ICEDIT_TEMPLATE.replace("{instruction}", "")
DIPTYCH_CAPTION = "A diptych with two side-by-side images of the same scene. On the right, "
COPY_PROMPTS = (
    "A diptych with two side-by-side images of the same scene.",
    DIPTYCH_PROMPT.removesuffix(" but "),
    "two side-by-side images of the same scene",
)


class Canvas(NamedTuple):
    """An image with holes in some quadrants, and the one to its left if it is a diptych."""

    prompt: str
    image: Scene
    holes: tuple[str, ...]
    left: Scene | None = None


def base_canvas(seed: int | str, edit: Edit) -> Canvas:
    """A canvas of the edit's scenes, never its instruction; the same for the same arguments.

    35 % single images and 30 % diptychs, described by a caption; 35 % diptychs of one image twice.
    """
    rng = random.Random(seed)
    kind = rng.random()
    if kind < 0.35:
        return Canvas(edit.target.caption, edit.target, _holes(rng))
    holes = PLACES if rng.random() < 0.7 else _holes(rng)
    if kind < 0.65:
        return Canvas(DIPTYCH_CAPTION + edit.target.caption, edit.target, holes, edit.source)
    return Canvas(rng.choice(COPY_PROMPTS), edit.source, holes, edit.source)


def _holes(rng: random.Random) -> tuple[str, ...]:
    count = rng.choice((1, 1, 2, 2, 3, 4))
    return tuple(sorted(rng.sample(PLACES, count), key=PLACES.index))
