"""Scenes of the shapes world and how they are drawn.

A scene is a flat background and one to three flat shapes, each in its own quadrant and of its own colour.
Drawing is closed form (coverage of a pixel by a signed distance), so that the checker can know every
image there is.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

COLOURS = {
    "red": (0.86, 0.14, 0.16),
    "green": (0.14, 0.62, 0.22),
    "blue": (0.14, 0.30, 0.86),
    "yellow": (0.97, 0.84, 0.16),
    "cyan": (0.16, 0.82, 0.88),
    "pink": (0.96, 0.44, 0.76),
    "white": (0.96, 0.96, 0.96),
    "black": (0.08, 0.08, 0.10),
}
KINDS = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.13, "large": 0.21}  # half width, as a fraction of the image
PLACES = ("top left", "top right", "bottom left", "bottom right")
SPLITS = ("train", "val", "test")

COLOUR_NAMES = tuple(COLOURS)
SIZE_NAMES = tuple(SIZES)
TEMPLATES = tuple((kind, size) for kind in KINDS for size in SIZES)


@dataclass(frozen=True)
class Shape:
    """One flat shape: kind, colour, size and place are words of this module's tables."""

    kind: str
    colour: str
    size: str
    place: str

    @property
    def name(self) -> str:
        """As instructions call it: colour and kind."""
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """A background colour and shapes in different quadrants, of different colours, ordered by place."""

    background: str
    shapes: tuple[Shape, ...]

    def at(self, place: str) -> Shape | None:
        """The shape in a quadrant, one of `PLACES`; None if it is empty."""
        return next((shape for shape in self.shapes if shape.place == place), None)

    @property
    def caption(self) -> str:
        """Names everything in the image, in reading order."""
        parts = [f"a {s.size} {s.colour} {s.kind} at the {s.place}" for s in self.shapes]
        listed = " and ".join(parts) if len(parts) < 3 else f"{parts[0]}, {parts[1]} and {parts[2]}"
        return f"a {self.background} background with {listed or 'nothing'}"

    @property
    def split(self) -> str:
        """Which of `SPLITS` this scene belongs to, by a hash of its caption (80 / 10 / 10 %)."""
        bucket = zlib.crc32(self.caption.encode()) % 10
        return "test" if bucket == 0 else "val" if bucket == 1 else "train"


def ordered(background: str, shapes: Sequence[Shape]) -> Scene:
    """The scene of these shapes, in any order."""
    return Scene(background, tuple(sorted(shapes, key=lambda s: PLACES.index(s.place))))


def random_scene(rng: random.Random, split: str | None = None, *, single: bool = False) -> Scene:
    """A scene of one to three shapes, or of a single one, from one split if named.

    Raises ValueError on an unknown split.
    """
    check_split(split)
    while True:
        background, *colours = rng.sample(COLOUR_NAMES, 1 + (1 if single else rng.choice((1, 2, 2, 3, 3))))
        places = rng.sample(PLACES, len(colours))
        shapes = [
            Shape(rng.choice(KINDS), colour, rng.choice(SIZE_NAMES), place)
            for colour, place in zip(colours, places, strict=True)
        ]
        scene = ordered(background, shapes)
        if split is None or scene.split == split:
            return scene


def single_scenes(seed: int, split: str) -> list[Scene]:
    """Every scene of one shape that belongs to a split, in the order of the seed."""
    check_split(split)
    scenes = [
        Scene(ground, (Shape(kind, colour, size, place),))
        for ground in COLOURS
        for colour in COLOURS
        if colour != ground
        for kind, size in TEMPLATES
        for place in PLACES
    ]
    scenes = [scene for scene in scenes if scene.split == split]
    random.Random(f"{seed} {split} single").shuffle(scenes)
    return scenes


def _distance(kind: str, x: Tensor, y: Tensor, r: float) -> Tensor:
    """Like a signed distance, negative inside; exact near straight edges, all that antialiasing needs."""
    if kind == "circle":
        return torch.sqrt(x * x + y * y) - r
    if kind == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.86 * r
    if kind == "triangle":  # apex up, base and height 2 r
        slope = 5**-0.5
        return torch.maximum(y - 0.94 * r, (2 * x.abs() - y - r) * slope)
    arm = 0.34 * r
    across = torch.maximum(x.abs() - r, y.abs() - arm)
    along = torch.maximum(y.abs() - r, x.abs() - arm)
    return torch.minimum(across, along)


@lru_cache(maxsize=16)
def coverage(cell: int) -> Tensor:
    """`[1 + kinds*sizes, cell, cell]` share of each pixel inside the shape; row 0 is the empty quadrant."""
    at = torch.arange(cell, dtype=torch.float32) + 0.5 - cell / 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    rows = [torch.zeros(cell, cell)]
    for kind, size in TEMPLATES:
        rows.append((0.5 - _distance(kind, x, y, SIZES[size] * 2 * cell)).clamp(0, 1))
    return torch.stack(rows)


@lru_cache(maxsize=1)
def palette() -> Tensor:
    """The colours [8,3] in 0..1, in the order of `COLOURS`."""
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32)


def codes(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Integers of scenes: background `[N]`, template `[N,4]` (0 = empty), colour `[N,4]` (0 where empty)."""
    background = torch.tensor([COLOUR_NAMES.index(s.background) for s in scenes])
    template = torch.zeros(len(scenes), 4, dtype=torch.long)
    colour = torch.zeros(len(scenes), 4, dtype=torch.long)
    for row, scene in enumerate(scenes):
        for shape in scene.shapes:
            place = PLACES.index(shape.place)
            template[row, place] = 1 + TEMPLATES.index((shape.kind, shape.size))
            colour[row, place] = COLOUR_NAMES.index(shape.colour)
    return background, template, colour


def render_many(scenes: Sequence[Scene], size: int = 64) -> Tensor:
    """Images of scenes, float32 `[N,size,size,3]` in 0..1. Raises ValueError on a size odd or below 16."""
    return render_codes(*codes(scenes), size)


def render_codes(background: Tensor, template: Tensor, colour: Tensor, size: int = 64) -> Tensor:
    """`render_many` from what `codes` returns: tens of thousands of images a second for a training loop."""
    cell = cell_size(size)
    cover = coverage(cell)[template].unsqueeze(-1)  # N place y x 1
    ground = palette()[background][:, None, None, None]
    cells = ground + cover * (palette()[colour][:, :, None, None] - ground)
    cells = cells.reshape(-1, 2, 2, cell, cell, 3).permute(0, 1, 3, 2, 4, 5)
    return cells.reshape(-1, size, size, 3)


def render(scene: Scene, size: int = 64) -> Tensor:
    """The image of a scene, float32 `[size,size,3]` in 0..1, flat colours with antialiased edges."""
    return render_many([scene], size)[0]


def cell_size(size: int) -> int:
    """The side of a quadrant in pixels. Raises ValueError on a size odd or below 16."""
    if size < 16 or size % 2:
        raise ValueError(f"size is {size}: shapes images need an even size of at least 16 pixels")
    return size // 2


def check_split(split: str | None) -> None:
    """Raise ValueError for a name that is no split; None is any."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {split!r}: use one of {', '.join(SPLITS)}")


def place_masks(places: Sequence[Sequence[str]], size: int = 64) -> Tensor:
    """Float32 `[N,size,size]`: 1 in the named quadrants."""
    table = torch.tensor([[p in row for p in PLACES] for row in places], dtype=torch.float32).reshape(
        -1, 2, 2
    )
    return table.repeat_interleave(size // 2, 1).repeat_interleave(size // 2, 2)
