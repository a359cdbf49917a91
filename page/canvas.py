"""A canvas without an edge that can be undone: a `CanvasStore` for each step back.

Steps share the files of patches that are the same in both: a store writes new files and never changes one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..models import outpaint
from ..models.outpaint.store import CanvasStore, Region

STEPS_BACK = 20
SNAP = 16  # px: what every model's sides divide by
LARGEST = 2048  # px a side of the box


def link(source: str, target: str) -> None:
    """The same file under another name, or a copy of it where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class Canvas:
    """The canvas of one visitor, in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._steps, self._count = [folder / "0"], 0

    @property
    def store(self) -> CanvasStore:
        """As it is now."""
        return CanvasStore(self._steps[-1])

    @property
    def bounds(self) -> Region | None:
        """Around everything known; None for an empty canvas."""
        return self.store.bounds

    def write(self, image: Tensor, x: int, y: int, over: str) -> None:
        """`CanvasStore.write`, as a step that can be undone."""
        self._count += 1
        step = self.folder / str(self._count)
        if self._steps[-1].is_dir():
            shutil.copytree(self._steps[-1], step, copy_function=link)
        CanvasStore(step).write(image, x, y, over=over)
        self._steps.append(step)
        for old in self._steps[: -STEPS_BACK - 1]:
            shutil.rmtree(old, ignore_errors=True)
        self._steps = self._steps[-STEPS_BACK - 1 :]

    def undo(self) -> None:
        """The canvas before the last step. Raises ValueError where there is none to undo."""
        if len(self._steps) == 1:
            raise ValueError(
                f"there is nothing to undo: {STEPS_BACK} steps are kept, from the first image on"
            )
        shutil.rmtree(self._steps.pop(), ignore_errors=True)


def first_box(known: Region, edge: int) -> Region:
    """Where to begin: a box of `edge` px, half of it over the right edge of what is known."""
    side = min(max(edge // SNAP * SNAP, SNAP), LARGEST)
    left = known.x + known.width - side // 2
    return Region(left // SNAP * SNAP, known.y, side, side)


def box_of(value: object) -> Region:
    """The selection box of the page, {x, y, width, height} in px. Raises ValueError for anything else."""
    try:
        box = Region(*(int(value[name]) for name in Region._fields))
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ValueError(f"the box is {str(value)[:100]}: give x, y, width and height in px") from None
    for name in ("width", "height"):
        side = getattr(box, name)
        if not SNAP <= side <= LARGEST or side % SNAP:
            raise ValueError(f"the box's {name} is {side}: use a multiple of {SNAP} from {SNAP} to {LARGEST}")
    return box


def paint_box(canvas: Canvas, box: Region, repaint: bool, paint: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Paint what is unknown in the box, or all of it; what is known elsewhere stays bit for bit.

    paint: given an image [1,h,w,3] whose hole was filled from its edge, and the hole [1,h,w]. Raises
    ValueError where nothing is to be painted.
    """
    image, unknown = canvas.store.read(box)
    hole = unknown.new_ones(unknown.shape) if repaint else unknown
    if not hole.any():
        raise ValueError("everything in the box is known: move it over an edge, or tick Repaint all")
    if not repaint:
        image = outpaint.fill(image, unknown, "edge")
    canvas.write(paint(image, hole), box.x, box.y, "all" if repaint else "unknown")
