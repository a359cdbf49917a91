"""One trial of many rows by the plain sampler: the held-out reward, and which rows are worth learning on.

A row that the model always gets right teaches reward training nothing, and costs as much as any other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .feed import latents_like
from .judging import Judge
from .losses import row_noise
from .rollout import Sampling

STRETCH = 1 << 52  # of the random stream; rollouts number their noise from 0


@torch.no_grad()
def try_rows(
    trainer: Any, batches: Any, numbers: Sequence[int], label: str = "", steps: int = 0, draw: int = 0
) -> dict[str, Tensor]:
    """Raw scores [N] by reward of one ODE picture of each row, from noise that `draw` and its number fix.

    In `steps` steps, 0 = as many as a rollout. With `label`, progress is shown under it. Every process calls
    it with rows of its own.
    """
    c = trainer.config
    judge = Judge(trainer.rewards, batches, c.use_targets)
    sampling = Sampling(steps or c.rollout_steps, c.rollout_guidance)
    parts = [
        places[start : start + c.micro_batch]
        for places in by_size(batches.entries, numbers)
        for start in range(0, len(places), c.micro_batch)
    ]
    out: dict[str, Tensor] = {}
    for places in trainer.bar(parts, label) if label else parts:
        some = [numbers[place] for place in places]
        batch = trainer.rollout_batch(batches, some)
        like = latents_like(batch)
        places_of_noise = [STRETCH + draw * len(batches.entries) + n for n in some]
        noise = row_noise(c.seed, places_of_noise, tuple(like.shape[1:])).to(like.device)
        latents, _ = trainer.policy.run(batch, noise, sampling, None, None)
        for name, values in judge(trainer.task.host.decode(latents), some).items():
            out.setdefault(name, torch.full((len(numbers),), torch.nan))[places] = values.float()
    return out


class Screened:
    """The rows of every update, without end: some rows are tried, the worst of them are learnt on, then the
    next are tried, by the model as it has become. `screen_rows`, `screen`: how many and which share at most.

    The rows of an update have one size; rows that fill none wait for the next round. `state` goes into
    checkpoints, since what was found cannot be found again after the weights have moved.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.round = 0
        self.updates: list[list[int]] = []  # of all processes together
        self.waiting: list[int] = []

    def state(self) -> dict[str, Any]:
        return {"round": self.round, "updates": self.updates, "waiting": self.waiting}

    def load(self, state: dict[str, Any]) -> None:
        self.round, self.updates, self.waiting = state["round"], state["updates"], state["waiting"]

    def __iter__(self) -> Screened:
        return self

    def __next__(self) -> list[int]:
        while not self.updates:
            self._try()
        count, rank = self.trainer.config.groups_per_update, self.trainer.rank
        return self.updates.pop(0)[rank * count : (rank + 1) * count]

    def _try(self) -> None:
        trainer, c = self.trainer, self.trainer.config
        entries = trainer.batches.entries
        rows = self._rows(min(c.screen_rows, len(entries)), len(entries))
        mine = rows[trainer.rank :: trainer.world]
        label = f"trying {len(rows)} rows"
        # With the round as the draw, a row's next trial starts from other noise.
        scores = try_rows(trainer, trainer.batches, mine, label, c.screen_steps, self.round)
        value = trainer.rewards.worth(scores)
        table = torch.stack([torch.tensor(mine, dtype=torch.float64), value.double()], 1)
        table = gathered(trainer.accelerator, table)
        table = table[~table[:, 1].isnan()].tolist()
        if not table:
            raise ValueError(f"the rewards could judge none of {len(rows)} rows: see the warnings above")
        values = {int(row): value for row, value in table}
        kept = [rows[place] for place in worst([values.get(row) for row in rows], c.screen)]
        pool, self.waiting = self.waiting + kept, []
        whole = c.groups_per_update * trainer.world
        for places in by_size(entries, pool):
            same = [pool[place] for place in places]
            full = len(same) // whole * whole
            self.updates += [same[start : start + whole] for start in range(0, full, whole)]
            self.waiting += same[full:]
        random.Random(f"{c.seed} updates {self.round}").shuffle(self.updates)
        self.round += 1

    def _rows(self, count: int, total: int) -> list[int]:
        """This round's rows: all are tried before one is tried again, in another order every time."""
        rows: list[int] = []
        for place in range(self.round * count, (self.round + 1) * count):
            again, position = divmod(place, total)
            if position == 0 or not rows:
                order = list(range(total))
                random.Random(f"{self.trainer.config.seed} rows {again}").shuffle(order)
            rows.append(order[position])
        return rows


def by_size(entries: Any, numbers: Sequence[int]) -> list[list[int]]:
    """Positions in `numbers`, those of rows that may share a batch together."""
    buckets: dict[tuple, list[int]] = {}
    for place, number in enumerate(numbers):
        buckets.setdefault(entries[number].bucket, []).append(place)
    return list(buckets.values())


def gathered(accelerator: Any, rows: Tensor) -> Tensor:
    """The rows [N,...] of all processes on the CPU, which may have different N: the rest is NaN."""
    rows = accelerator.pad_across_processes(rows.to(accelerator.device), pad_index=float("nan"))
    return accelerator.gather(rows).cpu()


def worst(values: Sequence[float | None], share: float) -> list[int]:
    """Positions of the lowest `share` of the values, in their order; failures (None, NaN) are left out.

    So are values as good as the best, unless all are: where a reward has a ceiling there is nothing to learn.
    """
    known = [(value, place) for place, value in enumerate(values) if value is not None and value == value]
    top = max((value for value, _ in known), default=0.0)
    below = [pair for pair in known if pair[0] < top] or known
    return sorted(place for _, place in sorted(below)[: max(1, round(share * len(values)))])
