"""One trial of many rows by the plain sampler: the held-out reward, and which rows are worth learning on.

A row that the model always gets right teaches reward training nothing, and costs as much as any other.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .data.sample import stamp
from .judging import Judge
from .losses import row_noise
from .rollout import Sampling

logger = logging.getLogger(__name__)
STRETCH = 1 << 52  # of the random stream; rollouts number their noise from 0


@torch.no_grad()
def try_rows(trainer: Any, batches: Any, numbers: Sequence[int], label: str = "") -> dict[str, Tensor]:
    """Raw scores [N] by reward of one ODE picture of each row, from noise that the row's number fixes.

    With `label`, progress is shown under it. Every process calls it with rows of its own.
    """
    c = trainer.config
    judge = Judge(trainer.rewards, batches, c.use_targets)
    sampling = Sampling(c.rollout_steps, c.rollout_guidance)
    sizes: dict[tuple[int, int], list[int]] = {}
    for place, number in enumerate(numbers):
        sizes.setdefault(batches.entries[number].size, []).append(place)
    parts = [
        places[start : start + c.micro_batch]
        for places in sizes.values()
        for start in range(0, len(places), c.micro_batch)
    ]
    out: dict[str, Tensor] = {}
    for places in trainer.bar(parts, label) if label else parts:
        some = [numbers[place] for place in places]
        batch = trainer.rollout_batch(batches, some)
        noise = row_noise(c.seed, [STRETCH + n for n in some], tuple(batch["latents"].shape[1:]))
        latents, _ = trainer.policy.run(batch, noise.to(batch["latents"].device), sampling, None, None)
        for name, values in judge(trainer.task.host.decode(latents), some).items():
            out.setdefault(name, torch.full((len(numbers),), torch.nan))[places] = values.float()
    return out


def keep_worst(trainer: Any) -> None:
    """Leave only the rows with the lowest rewards in `trainer.batches`, the share that `screen` names.

    The scores are kept in the run's folder; made again, they are the same, since the adapter still does
    nothing. Raises ValueError if so few rows are left that an update cannot be filled.
    """
    c, batches = trainer.config, trainer.batches
    path, told = trainer.output / "screened.json", stamp(batches.fingerprint(), c.rewards, c.reward_options)
    values = None
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        values = saved["values"] if saved["of"] == told else None
    if values is None:
        mine = list(range(len(batches.entries)))[trainer.rank :: trainer.world]
        scores = try_rows(trainer, batches, mine, "trying every row")
        value = sum(trainer.rewards.weights[name] * score for name, score in scores.items())
        table = torch.stack([torch.tensor(mine, dtype=torch.float64), value.double()], 1)
        table = gathered(trainer.accelerator, table)
        table = table[~table[:, 0].isnan()]
        values = table[table[:, 0].argsort(), 1].tolist()
        if trainer.main:
            beside = path.with_suffix(".tmp")
            beside.write_text(json.dumps({"of": told, "values": [None if v != v else v for v in values]}))
            beside.replace(path)
    kept = worst(values, c.screen)
    if len(kept) < c.groups_per_update * trainer.world:
        raise ValueError(
            f"screen {c.screen:g} leaves {len(kept)} of {len(values)} rows, an update takes "
            f"{c.groups_per_update * trainer.world}: raise screen or give more data"
        )
    logger.info("learning on the %d worst of %d rows", len(kept), len(values))
    batches.entries = [batches.entries[number] for number in kept]
    trainer.sampler = batches.sampler(c.batch_size, c.seed, trainer.rank, trainer.world, prior=False)


def gathered(accelerator: Any, rows: Tensor) -> Tensor:
    """The rows [N,...] of all processes on the CPU, which may have different N: the rest is NaN."""
    rows = accelerator.pad_across_processes(rows.to(accelerator.device), pad_index=float("nan"))
    return accelerator.gather(rows).cpu()


def worst(values: Sequence[float | None], share: float) -> list[int]:
    """Positions of the lowest `share` of the values, in their order; failures (None, NaN) are left out."""
    known = [(value, place) for place, value in enumerate(values) if value is not None and value == value]
    return sorted(place for _, place in sorted(known)[: max(1, round(share * len(values)))])
