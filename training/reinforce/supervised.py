"""Supervised rows beside reward training, and errors of predictions at states that sampling came through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..runtime.attention import for_learning
from ..runtime.random_streams import row_uniform
from ..tasks.losses import weighted_mse

DATA = 1 << 42  # stretch of the random stream for supervised rows
FLOOR = 0.05  # a drift that is left at the end cannot be undone there: its error must not weigh without limit


def learn(trainer: Any, rows: Sequence[int]) -> dict[str, list[Tensor]]:
    """Take this process's gradient of the supervised loss on these rows; the reward's is added to it.

    Returns what to log. `trainer` is a `grpo.GRPOTrainer`.
    """
    c, module = trainer.config, trainer.model.prepared[trainer.task.denoiser_part]
    first = (trainer.step * trainer.processes.world + trainer.processes.rank) * len(rows)
    log = []
    for start in range(0, len(rows), c.micro_batch):
        some = list(rows[start : start + c.micro_batch])
        places = [first + start + index for index in range(len(some))]
        batch, noise = trainer._with_noise(some, [False] * len(some), [DATA + place for place in places])
        with trainer.accelerator.no_sync(module), for_learning(noise):
            loss = trainer.task.row_losses(batch, noise, row_uniform(c.seed, places, "data"))
            trainer.accelerator.backward(c.supervised.weight / len(rows) * loss.sum())
        log.append(loss.detach())
    return {"data": log}


def errors(
    trainer: Any, batch: dict[str, Any], x: Tensor, time: Tensor, ends: Sequence[Tensor]
) -> list[Tensor]:
    """Squared error per row [B] of the clean latents predicted at x [B,C,h,w], time [B] towards each end.

    Divided by the task's noise share, so that it weighs about as a velocity's or epsilon's does.
    """
    task = trainer.task
    prediction = task.predict(x, time, batch, trainer.config.rollout_guidance)
    data = task.data_prediction(x.float(), time, prediction.float())
    cells, share = task.cells(batch, x), task.noise_share(time) + FLOOR
    return [weighted_mse(data, end, cells, batch.get("weight")) / share for end in ends]
