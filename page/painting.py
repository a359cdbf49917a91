"""The work of the Fill, Outpaint and Canvas tabs: what `diptych inpaint` and `diptych outpaint` do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..commands import inpaint, outpaint, painting
from ..commands.progress import quiet
from ..models import outpaint as methods
from ..models.outpaint import Piece
from ..models.outpaint.canvas import GROUND
from . import models
from .backend import Backend, read_image, seed_and_steps
from .canvas import Canvas, box_of, paint_box
from .jobs import Job


def fill(
    backend: Backend,
    job: Job,
    image: str | None,
    mask: Tensor | None,
    prompt: str,
    model: str,
    seed: int,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """(before, after) [1,H,W,C]: the white of a mask [1,H,W] painted as `diptych inpaint` does."""
    chosen, before = backend.offer.model(model, models.PAINT), read_image(image)
    if mask is None or not (mask >= 0.5).any():
        raise ValueError("nothing is drawn: paint over what is to change with the brush")
    args = backend.arguments(inpaint, chosen, **seed_and_steps(seed, steps))
    engine, words = painting.check_engine(args), painting.check_prompt(prompt or "")

    def paint(crop: Tensor, hole: Tensor) -> Tensor:
        job.more(painting.steps_of(engine, args))
        denoiser = _denoiser(backend, chosen, engine, args)
        return painting.sample(denoiser, engine, crop, hole, words, args, lambda _: job.step())

    return before, inpaint.repaired(paint, before, mask, engine, args)


def extend(
    backend: Backend,
    job: Job,
    image: str | None,
    prompt: str,
    amounts: dict[str, str],
    method: str,
    model: str,
    seed: int,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """(before, after) [1,H,W,C]: more on the sides, as `diptych outpaint` makes it.

    amounts: for left, top, right and bottom, `256` or `50%`, "" for none. Before is the image in the gray
    room that was painted, of the size of after.
    """
    chosen, known = backend.offer.model(model, models.PAINT), read_image(image)
    given = {side: _amount(side, text) for side, text in amounts.items() if str(text).strip()}
    args = backend.arguments(outpaint, chosen, **seed_and_steps(seed, steps), method=method, **given)
    engine, words = painting.check_engine(args), painting.check_prompt(prompt or "")
    if engine.name == "sd" and method == "tiles":
        raise ValueError("Stable Diffusion without an inpainting UNet knows no mask: choose another method")
    options = outpaint.options_of(args, engine)
    sides, how = outpaint.sides_of(args, known.shape[1:3]), method.replace("-", " ")
    methods.outpaint(outpaint.rehearse(args), known, sides, how, options)
    denoise = outpaint.DENOISE.get(how, 1.0)
    paint = _painter(backend, job, chosen, engine, words, args, denoise)
    after = methods.outpaint(paint, known, sides, how, options)
    return _in_its_room(known, after, sides), after


def canvas_box(
    backend: Backend,
    job: Job,
    canvas: Canvas,
    box: Any,
    repaint: bool,
    prompt: str,
    model: str,
    seed: int,
    steps: int,
) -> None:
    """Paint what is unknown in a box of the canvas, or all of it; by windows where the box is large."""
    chosen, region = backend.offer.model(model, models.PAINT), box_of(box)
    args = backend.arguments(outpaint, chosen, **seed_and_steps(seed, steps))
    engine, words = painting.check_engine(args), painting.check_prompt(prompt or "")

    def paint(image: Tensor, hole: Tensor) -> Tensor:
        large = max(image.shape[1:3]) > engine.size and engine.name != "sd"
        window = engine.size if large else None
        painter = _painter(backend, job, chosen, engine, words, args)
        return painter(Piece(image, hole, window=window))

    paint_box(canvas, region, bool(repaint), paint)


def natural_size(backend: Backend, model: str) -> int:
    """Pixels a side that a model of the menu was trained at."""
    chosen = backend.offer.model(model, models.PAINT)
    return painting.check_engine(backend.arguments(outpaint, chosen)).size


def _denoiser(backend: Backend, model: Any, engine: painting.Engine, args: argparse.Namespace) -> Any:
    quiet()
    return backend.loaded.get(model, lambda: painting.load(engine, args))


def _painter(backend, job, model, engine, words, args, denoise: float = 1.0) -> Callable[[Piece], Tensor]:
    denoiser = _denoiser(backend, model, engine, args)
    return painting.painter(denoiser, engine, words, args, lambda _: job.step(), job.more, denoise)


def _amount(side: str, text: Any) -> tuple[float, str]:
    try:
        return outpaint.amount(str(text))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{side}: {error}") from error


def _in_its_room(image: Tensor, finished: Tensor, sides: dict[str, int]) -> Tensor:
    """The image where it lies in the finished one [1,H,W,C], gray around it: what the slider compares."""
    room = torch.full_like(finished, GROUND)
    height, width = image.shape[1:3]
    cut = [max(-sides[side], 0) for side in ("top", "left", "bottom", "right")]
    shown = image[:, cut[0] : height - cut[2], cut[1] : width - cut[3], : finished.shape[-1]]
    top, left = max(sides["top"], 0), max(sides["left"], 0)
    room[:, top : top + shown.shape[1], left : left + shown.shape[2], : shown.shape[-1]] = shown
    return room
