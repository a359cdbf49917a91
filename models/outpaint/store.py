"""A canvas that never ends: an image in patches, each a PNG file, and a JSON file that says which there are.

Coordinates are pixels from wherever the first image was put, left and up of it negative. Alpha says what is
known. A write names new files first and the state last, so that a process killed at any moment leaves the
canvas as it was before the write or as it is after it. One process writes at a time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import pixels
from ..geometry import check_choice
from . import inputs
from .canvas import GROUND

PATCH = 1024  # pixels a side
STATE = "state.json"
PART = ".part"  # of a file that is not whole yet
VERSION = 1
OVER = ("all", "unknown", "start over")
FARTHEST = 2**24  # pixels from the origin: floats and PNG files stay exact
MOST = 2**26  # pixels of one image that is read, 0.8 GB


class Region(NamedTuple):
    """A rectangle of the canvas in pixels; x and y may be negative."""

    x: int
    y: int
    width: int
    height: int

    def with_(self, other: Region) -> Region:
        """The smallest region that holds both."""
        left, top = min(self.x, other.x), min(self.y, other.y)
        right = max(self.x + self.width, other.x + other.width)
        bottom = max(self.y + self.height, other.y + other.height)
        return Region(left, top, right - left, bottom - top)


class CanvasStore:
    """The canvas in a folder, which is made by the first write."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def state(self) -> dict:
        """What the JSON file says: patch size, {"column,row": file}, bounds. Raises ValueError if damaged."""
        path = self.folder / STATE
        if not path.is_file():
            return {"version": VERSION, "patch": PATCH, "bounds": None, "patches": {}}
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            fits = state["version"] == VERSION and state["patch"] > 0 and isinstance(state["patches"], dict)
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise ValueError(f"{path} is not a canvas of this version: choose another name, or delete it.")
        return state

    @property
    def bounds(self) -> Region | None:
        """Around everything that is known; None while nothing is."""
        found = self.state()["bounds"]
        return None if found is None else Region(*found)

    def read(self, region: Region) -> tuple[Tensor, Tensor]:
        """(image [1,h,w,3], mask [1,h,w], 1 = unknown) of a region; what is unknown is gray.

        Raises ValueError for a region without pixels, too large or too far, and for damaged files.
        """
        region = _checked(region)
        rgba = self._read(self.state(), region)
        known = rgba[..., 3] == 255
        image = torch.where(known[..., None], rgba[..., :3].float() / 255, GROUND)
        return image[None], (~known).float()[None]

    def write(self, image: Tensor, x: int, y: int, mask: Tensor | None = None, over: str = "all") -> Region:
        """Put an image [1,H,W,C] at (x, y), in 8 bits; returns the region.

        Of an image with alpha, and where `mask` [1,H,W] is given, only what is at least 0.5 in both.
        `over`: `all` replaces what is there, `unknown` leaves known pixels alone, `start over` empties the
        canvas first. Raises ValueError for a batch, and for a mask of another size.
        """
        check_choice("over", over, OVER)
        image = inputs.checked(image)
        if len(image) != 1:
            raise ValueError(f"image has {len(image)} items: write them one by one.")
        region = _checked(Region(x, y, image.shape[2], image.shape[1]))
        chosen = torch.ones(region.height, region.width, dtype=torch.bool)
        if image.shape[-1] == 4:
            chosen &= image[0, ..., 3].cpu() >= 0.5
        if mask is not None:
            chosen &= inputs.hole(mask, image.shape[1:3])[0].cpu() >= 0.5
        state = self.state()
        old = state if over != "start over" else {**state, "patches": {}, "bounds": None}
        if over == "unknown":
            chosen &= self._read(old, region)[..., 3] != 255
        colours = (pixels.rgb(image)[0].cpu() * 255).round().clamp(0, 255).to(torch.uint8)
        self._save(old, region, colours, chosen)
        return region

    def export(self) -> tuple[Tensor, Tensor, Region]:
        """(image, mask, region) of everything. Raises ValueError for an empty canvas."""
        bounds = self.bounds
        if bounds is None:
            raise ValueError(f"canvas {self.folder.name!r} is empty: write an image to it first.")
        return (*self.read(bounds), bounds)

    def _read(self, state: dict, region: Region) -> Tensor:
        """uint8 [h,w,4]; alpha 255 where known, else 0."""
        rgba = torch.zeros(region.height, region.width, 4, dtype=torch.uint8)
        for key, inside, outside in _pieces(region, state["patch"]):
            if name := state["patches"].get(key):
                rgba[outside] = self._load(name, state["patch"])[inside]
        return rgba

    def _load(self, name: str, side: int) -> Tensor:
        import numpy as np
        from PIL import Image

        try:
            with Image.open(self.folder / Path(name).name) as file:
                patch = torch.from_numpy(np.array(file.convert("RGBA")))
        except OSError as error:
            raise ValueError(f"{self.folder / name} cannot be read ({error}): restore it.") from error
        if tuple(patch.shape[:2]) != (side, side):
            raise ValueError(f"{self.folder / name} is not {side}x{side}: restore it.")
        return patch

    def _save(self, old: dict, region: Region, colours: Tensor, chosen: Tensor) -> None:
        patches, side = dict(old["patches"]), old["patch"]
        bounds = None if old["bounds"] is None else Region(*old["bounds"])
        self.folder.mkdir(parents=True, exist_ok=True)
        for key, inside, outside in _pieces(region, side):
            if not bool(chosen[outside].any()):
                continue
            named = patches.get(key)
            patch = self._load(named, side) if named else torch.zeros(side, side, 4, dtype=torch.uint8)
            part, here = patch[inside], chosen[outside]
            part[..., :3][here] = colours[outside][here]
            part[..., 3][here] = 255
            patches[key] = self._name(key, patch)
        if bool(chosen.any()):
            rows, columns = (chosen.any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
            new = Region(
                region.x + columns[0],
                region.y + rows[0],
                columns[-1] + 1 - columns[0],
                rows[-1] + 1 - rows[0],
            )
            bounds = new if bounds is None else bounds.with_(new)
        state = {
            "version": VERSION,
            "patch": side,
            "bounds": bounds,
            "patches": dict(sorted(patches.items())),
        }
        _write(self.folder / STATE, json.dumps(state, indent=1).encode())
        for file in self.folder.iterdir():  # replaced patches, and what a killed write has left
            if file.suffix in (".png", PART) and file.name not in patches.values():
                file.unlink()

    def _name(self, key: str, patch: Tensor) -> str:
        """Write a patch under a name of its own content, unless it is there; returns the name."""
        from PIL import Image

        data = io.BytesIO()
        Image.fromarray(patch.numpy(), "RGBA").save(data, "PNG", compress_level=1)
        content = data.getvalue()
        name = f"{key.replace(',', '_')}.{hashlib.sha256(content).hexdigest()[:16]}.png"
        if not (self.folder / name).is_file():
            _write(self.folder / name, content)
        return name


def _write(path: Path, content: bytes) -> None:
    """The whole file or none of it."""
    part = path.with_name(path.name + PART)
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _checked(region: Region) -> Region:
    region = Region(*map(int, region))
    if region.width < 1 or region.height < 1:
        raise ValueError(f"the region is {region.width}x{region.height}: give at least one pixel each way.")
    if region.width * region.height > MOST:
        raise ValueError(f"the region is {region.width}x{region.height}: read at most {MOST} pixels at once.")
    far = max(abs(region.x), abs(region.y), abs(region.x + region.width), abs(region.y + region.height))
    if far > FARTHEST:
        raise ValueError(f"the region reaches {far} px from the origin: stay within {FARTHEST}.")
    return region


def _pieces(region: Region, side: int) -> Iterator[tuple[str, tuple, tuple]]:
    """(key, slices within the patch, slices within the region) of every patch that the region touches."""
    for row in range(region.y // side, (region.y + region.height - 1) // side + 1):
        for column in range(region.x // side, (region.x + region.width - 1) // side + 1):
            top, left = max(region.y, row * side), max(region.x, column * side)
            bottom = min(region.y + region.height, (row + 1) * side)
            right = min(region.x + region.width, (column + 1) * side)
            inside = (
                slice(top - row * side, bottom - row * side),
                slice(left - column * side, right - column * side),
            )
            outside = slice(top - region.y, bottom - region.y), slice(left - region.x, right - region.x)
            yield f"{column},{row}", inside, outside
