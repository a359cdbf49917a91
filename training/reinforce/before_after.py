"""What reward training changed: the same starts before and after it, and what rewards say of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..choices import is_small
from ..data.dataset import latents_like
from ..evaluate import plots
from ..runtime.random_streams import row_noise
from .scoring import Judge, judged

SHOWN = 4
TRIED = 32  # rows of a toy model, whose pictures cost nothing


@torch.no_grad()
def before_after(trainer: Any) -> Tensor:
    """IMAGE [1,H,W,3] of `SHOWN` rows: given, before, after and (if the data has it) wanted; under each its
    reward before and after.

    Rows are held-out ones where there are any. Of a large model they are the first ones; a toy model tries
    `TRIED` and shows those that gained most, and last the one that lost most. The noise before and after is
    the same; the weights are those of the exported file, and stay in the model.
    """
    task, c = trainer.task, trainer.config
    batches = trainer.data.sample_batches if c.sample_data else trainer.data.batches
    kept = trainer.best or (trainer.model.average.values if trainer.model.average is not None else {})
    for name, value in kept.items():
        trainer.model.parameters[name].copy_(value)
    module = trainer.model.parts[task.denoiser_part]
    task.make_host(module)
    module.eval()
    judge = trainer.judge_of(batches)
    count = min(TRIED if is_small(c.model) else SHOWN, len(batches.entries))
    rows = [_row(trainer, batches, judge, number) for number in range(count)]
    gains = [after - before for _, _, before, after in rows]
    shown = [
        (panels, f"{_said(before)} -> {_said(after)}: {prompt}")
        for panels, prompt, before, after in (rows[place] for place in most_changed(gains, SHOWN))
    ]
    headings = ["given", "before", "after", "wanted"][: 3 + judge.targets]
    if len(shown[0][0]) < len(headings):
        headings = headings[1:]  # nothing is given where all is painted
    return plots.as_image(plots.contact_sheet(shown, headings, side=128, columns=1))


def _said(reward: float) -> str:
    return "not judged" if math.isnan(reward) else f"{reward:.2f}"


def most_changed(gains: Sequence[float], count: int) -> list[int]:
    """Places of the largest gains, falling, and last of the largest loss; all in order if there are no more
    than `count`. NaN counts as no change."""
    if len(gains) <= count:
        return list(range(len(gains)))
    known = [0.0 if math.isnan(gain) else gain for gain in gains]
    order = sorted(range(len(known)), key=lambda place: -known[place])
    return [*order[: count - 1], order[-1]]


def _row(trainer: Any, batches: Any, judge: Judge, number: int) -> tuple[list[Tensor], str, float, float]:
    """(panels [H,W,3], prompt, reward before, reward after) of one row of the data."""
    task, c = trainer.task, trainer.config
    batch = trainer._to_device(batches([number], [False]))
    batch = task.guided(batch, batches.text, c.sample_guidance)
    like = latents_like(batch)
    noise = row_noise(c.seed, [number], tuple(like.shape[1:])).to(like.device)
    with trainer.untrained():
        made = [task.sample(batch, noise)]
    made.append(task.sample(batch, noise))
    rewards = [trainer.rewards.weighted_sum(judged(judge(picture, [number]))) for picture in made]
    if judge.targets:
        made.append(task.host.decode(batch["latents"]))
    given = batch.get("masked_latents", batch.get("references"))
    shown = [task.host.decode(given)] if given is not None else []
    panels = [picture.float().cpu()[0] for picture in (*shown, *made)]
    if judge.row(number).diptych:
        middle = panels[0].shape[1] // 2
        panels = [panels[0][:, :middle], *(panel[:, middle:] for panel in panels[1:])]
    prompt = batches.corpus.source[batches.entries[number].index].prompt
    return panels, prompt, rewards[0], rewards[1]
