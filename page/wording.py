"""The Generate and caption tab's work: `diptych generate` and `diptych caption`."""

from __future__ import annotations

import html
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..commands import multimodal
from ..commands.values import LARGEST_SEED
from . import models
from .backend import Backend, number, read_image
from .jobs import Job

MOST = 16  # images, and captions, at once


def generate(
    backend: Backend,
    job: Job,
    prompt: str,
    model: str,
    count: int,
    steps: int,
    cfg: float,
    seed: int,
    *,
    remark: Callable[[str], Any] | None = None,
) -> Tensor:
    """IMAGE [count,S,S,3] for a text. Raises ValueError in one sentence before a model is loaded.

    remark: told what the model does not read of the text, as HTML.
    """
    if not (prompt or "").strip():
        raise ValueError("the prompt is empty: say what the image shows")
    from ..models.multimodal.reading import remarks

    count, steps = int(number("images", count, 1, MOST)), int(number("steps", steps, 1, 1000))
    cfg, seed = number("guidance", cfg, 0, 100), int(number("seed", seed, 0, LARGEST_SEED))
    made = _model(backend, model)
    for sentence in remarks(made, prompt):
        if remark:
            remark(html.escape(sentence, quote=False))
    job.more(steps)
    return made.generate_from_text(
        [prompt.strip()], count, True, steps, seed, cfg=cfg, callback=lambda *_: job.step()
    )


def caption(
    backend: Backend, job: Job, image: str | None, model: str, count: int, temperature: float, seed: int
) -> list[str]:
    """What an image shows: the likeliest caption, or several drawn ones (`diptych caption`)."""
    shown, count = read_image(image), int(number("captions", count, 1, MOST))
    temperature, seed = number("temperature", temperature, 0, 10), int(number("seed", seed, 0, LARGEST_SEED))
    if count > 1 and not temperature:
        raise ValueError("temperature is 0, the likeliest caption only: raise it, or ask for one caption")
    made = _model(backend, model)
    job.more(0)
    (captions,) = made.generate_from_image(
        shown, count, temperature, 50, 0.9, 1.3 if temperature else 1.0, seed=seed
    )
    return captions


def _model(backend: Backend, label: str) -> Any:
    chosen = backend.offer.model(label, models.WORDS)
    source = None if chosen.source is None else Path(chosen.source)
    args = Namespace(model=source, device=backend.device)
    folder = multimodal.check_model(args)
    return backend.loaded.get(chosen, lambda: multimodal.load(folder, args))
