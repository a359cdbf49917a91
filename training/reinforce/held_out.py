"""Held-out rows: sampled by the plain ODE and scored, they say which weights of a run are the best."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Entry
from ..rewards import Composite
from ..runtime.checkpoint import TrainingError
from ..runtime.processes import Processes
from ..tasks.base import Task
from ..tasks.sampling import RolloutSettings, noise_for
from .scoring import RowScorer, judged
from .weights import Named, copied

logger = logging.getLogger(__name__)

STRETCH = 1 << 52  # of the random stream; rollouts number their noise from 0
PATIENCE = 5  # evaluations in a row with a falling reward that end the run; the best weights are kept


class HeldOut:
    """The evaluations of a run so far, and the best weights by them.

    history: {"step", "value", "scores"} of each evaluation; best: float32 copies of the weights, or None;
    best_scores: their mean scores by reward.
    """

    def __init__(self, rewards: Composite, rows: int):
        """rows: how many are evaluated."""
        self.rewards, self.rows = rewards, rows
        self.history: list[dict[str, Any]] = []
        self.best: Named | None = None
        self.best_scores: dict[str, float] | None = None

    def record(self, step: int, raw: Mapping[str, Tensor], weights: Named) -> dict[str, float]:
        """Note the raw scores [N] by reward after `step` updates; returns their means, for the log.

        weights are kept where they are the best so far. Raises TrainingError where nothing was ever judged.
        """
        scores = judged(raw)
        if not scores:  # one evaluation may go without
            if not self.history:
                raise TrainingError(
                    f"no reward could judge any of the {self.rows} held-out images: see the warnings above "
                    f"for {', '.join(self.rewards.weights)}, or set eval_rows: 0"
                )
            logger.warning("no reward could judge the held-out images after %d updates", step)
            return {}
        value = self.rewards.weighted_sum(scores)
        self.history.append({"step": step, "value": value, "scores": scores})
        logger.info("held-out reward after %d updates: %.4f", step, value)
        if self.best_scores is None or self.rewards.better(scores, self.best_scores):
            self.best_scores, self.best = scores, copied(weights)
        return scores

    @property
    def collapsed(self) -> bool:
        """Whether the reward fell `PATIENCE` times in a row."""
        scores = [entry["scores"] for entry in self.history[-PATIENCE - 1 :]]
        return len(scores) > PATIENCE and all(
            not self.rewards.better(b, a) for a, b in zip(scores, scores[1:], strict=False)
        )

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(step, reward) of the evaluations."""
        return [(entry["step"], entry["value"]) for entry in self.history if math.isfinite(entry["value"])]


@torch.no_grad()
def sampled_scores(
    task: Task,
    scorer: RowScorer,
    make_batch: Callable[[list[int]], dict[str, Any]],
    numbers: Sequence[int],
    settings: RolloutSettings,
    *,
    micro_batch: int,
    seed: int,
) -> dict[str, Tensor]:
    """Raw scores [N] float32 by reward of one ODE image of each row, from noise that its number fixes.

    make_batch: row numbers to the tensors that sampling needs. Every process calls it with rows of its own,
    maybe none.
    """
    parts = [
        places[start : start + micro_batch]
        for places in by_size(scorer.batches.entries, numbers)
        for start in range(0, len(places), micro_batch)
    ]
    # All rewards, whether there are rows or not: every process gathers as many tables.
    out = {reward.name: torch.full((len(numbers),), torch.nan) for reward in scorer.rewards.rewards}
    for places in parts:
        some = [numbers[place] for place in places]
        batch = make_batch(some)
        noise = noise_for(batch, seed, [STRETCH + number for number in some])
        latents, _ = task.rollout(batch, noise, settings)
        for name, values in scorer.score(task.host.decode(latents), some).items():
            out[name][places] = values
    return out


def by_size(entries: Sequence[Entry], numbers: Sequence[int]) -> list[list[int]]:
    """Positions in `numbers`, those of rows that may share a batch together."""
    buckets: dict[tuple, list[int]] = {}
    for place, number in enumerate(numbers):
        buckets.setdefault(entries[number].bucket, []).append(place)
    return list(buckets.values())


def gathered(processes: Processes, scores: Tensor) -> Tensor:
    """The scores [N] of all processes on the CPU, which may have different N: the rest is NaN."""
    accelerator = processes.accelerator
    padded = accelerator.pad_across_processes(scores.to(processes.device), pad_index=float("nan"))
    return accelerator.gather(padded).cpu()
