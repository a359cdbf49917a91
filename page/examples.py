"""Examples of the page, drawn at its start: held-out images of the world that the tiny models know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..models.image_files import to_pil

EDITS = (7, 1, 2, 4)  # numbers of held-out pairs
PAINTED = (0, 5)
MARK = (255, 56, 96)  # the brush's colour
TEXTS = [
    ["a white background with a small red circle at the top left"],
    ["a black background with a large yellow square at the bottom right"],
]


def pair(number: int) -> Any:
    """A held-out pair: source and target [64,64,3], mask, instruction, caption of the target."""
    from ..training.tiny.shapes import edit_pairs

    return next(edit_pairs(number, 1, "test"))


def edits(folder: Path) -> list[list[Any]]:
    """[image, instruction] of each example of the Edit tab."""
    return [
        [_written(made.source, folder, f"edit_{number}"), made.instruction]
        for number in EDITS
        for made in [pair(number)]
    ]


def fills(folder: Path) -> list[list[Any]]:
    """[editor's value, prompt]: a quadrant of an image is marked, the caption says what was there."""
    rows = []
    for number in PAINTED:
        image, caption = pair(number).target, pair(number).caption
        layer = torch.zeros(*image.shape[:2], 4)
        layer[32:, 32:] = torch.tensor([*(value / 255 for value in MARK), 1.0])
        seen = torch.where(layer[..., 3:] > 0, layer[..., :3], image)
        files = (_written(image, folder, f"fill_{number}"), _written(layer, folder, f"fill_{number}_mask"))
        whole = _written(seen, folder, f"fill_{number}_marked")
        rows.append([{"background": files[0], "layers": [files[1]], "composite": whole}, caption])
    return rows


def outpaints(folder: Path) -> list[list[Any]]:
    """[half an image, the whole one's caption, amounts for left, top, right, bottom]."""
    rows = []
    for number, left, right in ((0, "", "100%"), (5, "100%", "")):
        made = pair(number)
        half = made.target[:, :32] if right else made.target[:, 32:]
        rows.append([_written(half, folder, f"half_{number}"), made.caption, left, "", right, ""])
    return rows


def images(folder: Path) -> list[list[str]]:
    """Images of one shape, as the tiny multimodal model knows them."""
    import random

    from ..training.tiny.shapes import render, single_scenes

    scenes = random.Random(4).sample(single_scenes(0, "test"), 3)
    return [[_written(render(scene), folder, f"single_{i}")] for i, scene in enumerate(scenes)]


def start() -> tuple[Tensor, str]:
    """An image [1,64,64,3] to begin a canvas with, and its caption."""
    made = pair(PAINTED[0])
    return made.target[None], made.caption


def _written(image: Tensor, folder: Path, name: str) -> str:
    place = folder / "examples" / f"{name}.png"
    place.parent.mkdir(parents=True, exist_ok=True)
    drawn: Image.Image = to_pil(image)
    drawn.save(place)
    return str(place)
