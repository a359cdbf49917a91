"""What reward training changed: held-out rows sampled before and after it, and what rewards say of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluate import plots
from ..tasks.base import Task
from ..tasks.sampling import noise_for
from .scoring import RowScorer, judged
from .weights import ReferenceModel

SHOWN = 4  # rows of the sheet
MANY = 32  # rows that those are chosen from, of a tiny model


@torch.no_grad()
def sheet(
    task: Task,
    scorer: RowScorer,
    make_batch: Callable[[list[int]], dict[str, Any]],
    reference: ReferenceModel,
    *,
    seed: int,
    rows: int = SHOWN,
) -> Tensor:
    """IMAGE [1,H,W,3] of `SHOWN` rows: source, before, after and (if the data has it) target; under each its
    reward before and after.

    Of the first `rows` rows those that gained most, and last the one that lost most. The noise before and
    after is the same. make_batch: row numbers to the tensors that sampling needs.
    """
    made = [
        _row(task, scorer, make_batch([number]), reference, number, seed)
        for number in range(min(rows, len(scorer.batches.entries)))
    ]
    gains = [after - before for _, _, before, after in made]
    shown = [
        (panels, f"{_said(before)} -> {_said(after)}: {prompt}")
        for panels, prompt, before, after in (made[place] for place in most_changed(gains, SHOWN))
    ]
    headings = ["source", "before", "after", "target"][: 3 + scorer.targets]
    if len(shown[0][0]) < len(headings):
        headings = headings[1:]  # there is no source where all is painted
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


def _row(
    task: Task,
    scorer: RowScorer,
    batch: dict[str, Any],
    reference: ReferenceModel,
    number: int,
    seed: int,
) -> tuple[list[Tensor], str, float, float]:
    """(panels [H,W,3], prompt, reward before, reward after) of one row of the data."""
    noise = noise_for(batch, seed, [number])
    with reference.active():
        made = [task.sample(batch, noise)]
    made.append(task.sample(batch, noise))
    rewards = [scorer.rewards.weighted_sum(judged(scorer.score(image, [number]))) for image in made]
    if scorer.targets:
        made.append(task.host.decode(batch["latents"]))
    source = task.source(batch)
    shown = made if source is None else [source, *made]
    panels = [image.float().cpu()[0] for image in shown]
    row = scorer.row(number)
    if row.diptych:
        middle = panels[0].shape[1] // 2
        panels = [panels[0][:, :middle], *(panel[:, middle:] for panel in panels[1:])]
    return panels, row.prompt, rewards[0], rewards[1]
