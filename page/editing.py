"""The Edit tab's work: `diptych edit` with the page's choices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..commands import best_of, edit, loras
from ..commands.progress import quiet
from . import models
from .backend import Backend, number, read_image, seed_and_steps
from .jobs import Job

MOST = 16  # candidates


def run(
    backend: Backend,
    job: Job,
    image: str | None,
    instruction: str,
    model: str,
    lora: str,
    strength: float,
    candidates: int,
    seed: int,
    steps: int,
) -> tuple[Tensor, Tensor, str]:
    """(before [1,H,W,C], after [1,H,W,C], what was done), as `diptych edit` makes it.

    steps 0: the model's own number. Raises ValueError in one sentence before a model is loaded.
    """
    chosen = backend.offer.model(model, models.EDIT)
    before = read_image(image)
    file = backend.offer.lora(lora, chosen)
    candidates = int(number("best of", candidates, 1, MOST))
    if candidates > 1 and chosen.source is not None and not backend.judges:
        raise ValueError("best of several needs a judge: start the page with, for example, --judge vlm_yes")
    args = backend.arguments(
        edit,
        chosen,
        image=image,
        instruction=instruction or "",
        lora=[] if file is None else [f"{file}:{number('LoRA strength', strength, -10, 10)}"],
        best_of=candidates,
        judge=list(backend.judges) if candidates > 1 else [],
        **seed_and_steps(seed, steps),
    )
    request = edit.check(args)
    if lora == models.NO_LORA:
        request = replace(request, loras=())
    told: list[str] = [f"The model saw the image, {request.sizing}."]
    request = replace(request, sampling=_telling(request.sampling, told))
    job.more(best_of.evaluations(request.sampling))
    quiet()
    denoiser = backend.loaded.get(chosen, lambda: edit.load(request, args))
    handles: list[Any] = []
    try:
        handles += loras.apply(denoiser.transformer, request.loras)
        told += [str(handle.report).replace("\n", "  \n") for handle in handles]
        after = edit.sample(denoiser, request, handles, args, lambda state: job.step(len(state["x"])))
    finally:
        for handle in handles:
            handle.unpatch()
    return before, after, "\n\n".join(told)


def _telling(sampling: Any, told: list[str]) -> Any:
    """The sampling, its judges' scores added to `told`."""
    best = sampling.best_of
    if best is None:
        return sampling

    def tell(made: Any) -> None:
        told.append(f"{best_of.scores(made, best.judge.rewards, sampling.seed).capitalize()}.")

    return replace(sampling, best_of=replace(best, on_result=tell))
