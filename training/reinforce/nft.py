"""DiffusionNFT (arXiv 2509.16117): learn from clean rollouts by forward diffusion, without log-probabilities.

Each rollout is noised again, and the model is pulled towards an implicit positive policy and away from a
negative one, by how good the rollout was. The rollouts come from a slowly following "old" policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...samplers.gaussian import velocity_kl
from ..runtime.optim import MovingAverage
from ..runtime.random_streams import row_noise, row_uniform
from ..tasks.losses import sigma_from_uniform
from . import contrastive
from .advantage import ADVANTAGE_MAX

NORM_FLOOR = 1e-5
OLD_RAMP = 0.001  # growth per update of the old policy's decay, as in the authors' configuration


def preference(advantage: Tensor) -> Tensor:
    """Advantage [B] in -`ADVANTAGE_MAX`..`ADVANTAGE_MAX` -> optimality probability [B] in 0..1."""
    return (advantage / ADVANTAGE_MAX / 2 + 0.5).clamp(0, 1)


def nft_loss(data: Tensor, data_old: Tensor, x0: Tensor, wanted: Tensor, beta: float) -> Tensor:
    """The contrastive loss per sample [B].

    data, data_old [B,...]: the clean latents that the present and the old weights predict (for a velocity:
    x - sigma v); wanted [B] in 0..1. The mixtures v+ = beta v + (1-beta) v_old and v- = (1+beta) v_old -
    beta v are taken of these, in which they are linear too: so it serves velocity and epsilon models alike.
    Each is compared with x0; its squared error is divided by its own mean absolute error (detached) and
    multiplied by the largest advantage, which `preference` divides by, as in the authors' code.
    """
    losses = []
    for mixed in (beta * data + (1 - beta) * data_old, (1 + beta) * data_old - beta * data):
        error = mixed - x0
        weight = error.detach().abs().flatten(1).mean(1).clamp_min(NORM_FLOOR)
        losses.append((error**2).flatten(1).mean(1) / weight)
    positive, negative = losses
    return ADVANTAGE_MAX * (wanted * positive / beta + (1 - wanted) * negative / beta)


class OldPolicy:
    """The weights that make the rollouts: old <- d old + (1-d) new, d = min(ramp * update, max)."""

    def __init__(self, parameters: dict[str, Tensor], top: float, ramp: float = OLD_RAMP):
        self._average = MovingAverage(parameters, 0.0)
        self.ramp, self.top = ramp, top

    @property
    def values(self) -> dict[str, Tensor]:
        return self._average.values

    @values.setter
    def values(self, values: dict[str, Tensor]) -> None:
        self._average.values = values

    @contextmanager
    def active(self, parameters: dict[str, Tensor]) -> Iterator[None]:
        """The old weights are in the model inside the block."""
        self._average.swap(parameters)
        try:
            yield
        finally:
            self._average.swap(parameters)

    @torch.no_grad()
    def follow(self, parameters: dict[str, Tensor], update: int) -> None:
        """Move towards the present weights after `update` updates."""
        decay = min(self.ramp * update, self.top)
        for name, value in self.values.items():
            value.lerp_(parameters[name].detach().float(), 1 - decay)


def objective(trainer: Any, rollout: Any, index: int, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [B] of one noise level of a rollout; called by `GRPOTrainer`. Terms behind them are `winners`'."""
    c = trainer.config
    if index >= c.nft_times:
        return contrastive.objective(trainer, rollout, index - c.nft_times)
    x0 = rollout.latents
    # With one noise and level for a whole group, what its members share cancels in the sum over advantages.
    share = c.group_size if c.nft_shared_noise else 1
    positions = [member // share * c.nft_times + index for member in rollout.members]
    u = row_uniform(c.seed, positions, "nft")
    level = sigma_from_uniform(u, *c.sigmas)
    level = level.to(x0.device).clamp(1e-3, 1 - 1e-3)
    noise = row_noise(c.seed, [(1 << 41) + position for position in positions], tuple(x0.shape[1:]))
    x, time = trainer.task.noised(x0, noise.to(x0.device), level)
    reference = trainer.reference(x, time, rollout.batch) if c.kl_beta else None
    same = c.nft_old_max == 0 and c.inner_updates == 1  # the old weights are the present ones
    if not same:  # before the prediction with gradient: the weights are swapped in place
        with torch.no_grad(), trainer.old.active(trainer.model.parameters):
            old = trainer.task.predict(x, time, rollout.batch, c.rollout_guidance)
    prediction = trainer.task.predict(x, time, rollout.batch, c.rollout_guidance)
    old = prediction.detach() if same else old
    data, data_old = (trainer.task.data_prediction(x, time, p.float()) for p in (prediction, old))
    wanted = preference(advantage)
    loss = nft_loss(data, data_old, x0, wanted, c.nft_beta) * trainer.task.data_weight(time)
    measures = {"nft": loss}
    if reference is not None:
        measures["kl"] = velocity_kl(prediction, reference)
        loss = loss + c.kl_beta * measures["kl"]
    return loss, measures
