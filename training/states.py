"""Supervised rows beside reward training, if asked for at the states that sampling visits (DAgger, arXiv
1011.0686).

These are aimed at the wanted picture. Plain training only ever sees that picture noised; sampling in many
steps drifts off such states, and a model that never saw where it drifts to does not come back. So an edit
that is right in one step can go wrong in sixteen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import for_learning
from .losses import row_uniform, weighted_mse
from .rollout import EpsilonPolicy, FlowPolicy, Sampling

DATA = 1 << 42  # stretch of the random stream for supervised rows
FLOOR = 0.05  # a drift that is left at the end cannot be undone there: its error must not weigh without limit
State = tuple[Tensor, Tensor | int]  # x [B,C,h,w] and its sigma or timestep


def learn(trainer: Any, rows: Sequence[int]) -> dict[str, list[Tensor]]:
    """Take this process's gradient of the supervised loss on these rows; the reward's is added to it.

    Returns what to log. `trainer` is a `grpo.GRPOTrainer`, `data_states` of whose configuration says where.
    """
    c, module = trainer.config, trainer.prepared[trainer.task.denoiser_part]
    first = (trainer.step * trainer.world + trainer.rank) * len(rows)
    times, log = max(1, c.data_states), []
    weight = c.data_weight / (times * len(rows))
    for start in range(0, len(rows), c.micro_batch):
        some = list(rows[start : start + c.micro_batch])
        places = [first + start + index for index in range(len(some))]
        batch, noise = trainer._with_noise(some, [False] * len(some), [DATA + place for place in places])
        found: list[State] = []
        if c.data_states:
            batch = trainer.task.guided(batch, trainer.batches.text, c.rollout_guidance)
            sampling = Sampling(c.sample_steps, c.rollout_guidance)
            found = visited(trainer.policy, batch, noise, sampling)
        for number in range(times):
            with trainer.accelerator.no_sync(module), for_learning(noise):
                if found:
                    loss = losses(trainer, batch, found, places, number)
                else:
                    loss = trainer.task.row_losses(batch, noise, row_uniform(c.seed, places, "data"))
                trainer.accelerator.backward(weight * loss.sum())
            log.append(loss.detach())
    return {"data": log}


@torch.no_grad()
def visited(
    policy: FlowPolicy | EpsilonPolicy, batch: dict[str, Any], noise: Tensor, sampling: Sampling
) -> list[State]:
    """States of the plain ODE from `noise`, but its start: noise is what plain training begins with too."""
    states: list[State] = []

    def note(event: dict[str, Any]) -> None:
        if event["i"]:
            states.append((event["x"], event["sigma"] if "sigma" in event else event["t"]))

    policy.run(batch, noise, sampling, None, None, callback=note)
    return states


def losses(
    trainer: Any, batch: dict[str, Any], states: Sequence[State], places: Sequence[int], number: int
) -> Tensor:
    """Squared error per row [B] of the clean latents predicted at one of the visited states.

    places: of the rows in the random stream, which with `number` fix each row's state.
    """
    u = row_uniform(trainer.config.seed, list(places), f"state {number}")
    picks = (u * len(states)).long()
    x = torch.stack([states[pick][0][row] for row, pick in enumerate(picks.tolist())])
    time = torch.stack([torch.as_tensor(states[pick][1]) for pick in picks.tolist()]).to(x.device)
    (rows,) = errors(trainer, batch, x, time, [batch["latents"].float()])
    return rows


def errors(
    trainer: Any, batch: dict[str, Any], x: Tensor, time: Tensor, ends: Sequence[Tensor]
) -> list[Tensor]:
    """Squared error per row [B] of the clean latents predicted at x [B,C,h,w], time [B] towards each end.

    Divided by the policy's noise share, so that it weighs about as a velocity's or epsilon's does.
    """
    policy = trainer.policy
    prediction = policy.predict(x, time, batch, trainer.config.rollout_guidance)
    data = policy.data(x.float(), time, prediction.float())
    cells, share = trainer.task.cells(batch, x), policy.noise_share(time) + FLOOR
    return [weighted_mse(data, end, cells, batch.get("weight")) / share for end in ends]
