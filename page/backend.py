"""What every job of the page needs: the models on offer, the options of the command, a folder of its own.

Jobs take the arguments of the `diptych` commands, so that the page checks and does what they do.
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image
from torch import Tensor

from .. import failures
from ..commands import edit, images, inpaint, outpaint
from ..commands.values import LARGEST_SEED, Parser
from .canvas import Canvas
from .jobs import Jobs
from .models import Loaded, Model, Offer

MOST_STEPS = 1000
NEEDED = {edit: (), outpaint: ("image", "prompt"), inpaint: ("image", "prompt", "--mask", "mask")}


@dataclass
class Backend:
    """One running page. judges: rewards that choose the best of several (`diptych edit --judge`)."""

    offer: Offer
    device: str | None = None
    dtype: str = "auto"
    offload: bool = False
    judges: tuple[str, ...] = ()
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="diptych_web_")))
    loaded: Loaded = field(default_factory=Loaded)
    jobs: Jobs = field(default_factory=Jobs)
    _canvases: dict[str, Canvas] = field(default_factory=dict)

    def arguments(self, command: ModuleType, model: Model, **given: Any) -> argparse.Namespace:
        """A command's arguments: its defaults, the page's options, and what is given."""
        parser = Parser(prog="diptych")
        command.add_parser(parser.add_subparsers())
        name = command.__name__.rpartition(".")[2]
        args = parser.parse_args([name, *NEEDED[command]])
        offload = self.offload and model.engine in ("fill", "kontext")
        fixed = {"engine": model.engine, "model": model.source, "output": self.folder / "out.png"}
        fixed |= {"device": self.device, "dtype": self.dtype, "offload": offload}
        for key, value in {**fixed, **given}.items():
            setattr(args, key, value)
        return args

    def canvas(self, visitor: str) -> Canvas:
        """The visitor's canvas, empty at first."""
        if visitor not in self._canvases:
            self._canvases[visitor] = Canvas(Path(tempfile.mkdtemp(prefix="canvas_", dir=self.folder)))
        return self._canvases[visitor]

    def forget(self, visitor: str) -> None:
        """A visitor has gone: their work ends, their canvas is deleted."""
        self.jobs.stop(visitor)
        canvas = self._canvases.pop(visitor, None)
        if canvas is not None:
            shutil.rmtree(canvas.folder, ignore_errors=True)

    def close(self) -> None:
        """Delete everything that was uploaded and made."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def sentence(self, error: BaseException) -> str:
        """What to say of an error, as HTML: files of the page by their names alone."""
        said = failures.explain(error).sentence
        return html.escape(re.sub(rf"{re.escape(str(self.folder))}(/[^\s/]+)*/", "", said), quote=False)


def number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number of the page. Raises ValueError for an empty field and one out of range."""
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} is {'empty' if value is None else value}: give {low:g} to {high:g}")
    return value


def seed_and_steps(seed: Any, steps: Any) -> dict[str, int | None]:
    """Both as the commands take them; 0 steps are the model's own number. Raises ValueError."""
    chosen = int(number("seed", seed, 0, LARGEST_SEED))
    return {"seed": chosen, "steps": int(number("steps", steps, 0, MOST_STEPS)) or None}


def read_image(path: str | None, what: str = "an image") -> Tensor:
    """IMAGE [1,H,W,C] of an uploaded file. Raises ValueError where there is none or it cannot be read."""
    if not path:
        raise ValueError(f"{what} is missing: drop one, or click an example")
    return images.load_image(path)


def save_png(image: Tensor, folder: Path, name: str) -> str:
    """Write an image [1,H,W,C] into a new folder inside `folder`; returns the file."""
    place = Path(tempfile.mkdtemp(prefix="made_", dir=folder)) / name
    images.save(images.to_pil(image[0]), place)
    return str(place)


def both(before: Tensor, after: Tensor) -> tuple[Image.Image, Image.Image]:
    """Two images [1,H,W,C] for the slider, which lays one over the other."""
    return images.to_pil(before[0]), images.to_pil(after[0])
