"""What reward training minimises: the clipped policy gradient (GRPO) or DiffusionNFT.

An objective is built once for a run. It says which steps of a rollout are recorded, whose weights make the
rollouts, how many backward passes ("terms") a micro-batch takes and the loss of each. Whoever sums the terms
up is `gradients.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...samplers.gaussian import velocity_kl
from ..runtime.random_streams import row_noise, row_uniform
from ..tasks.base import Task
from ..tasks.losses import sigma_from_uniform
from .advantage import ADVANTAGE_MAX
from .config import GRPOConfig
from .contrastive import Contrastive, with_best
from .rollout import Rollout
from .weights import Named, OldPolicy, ReferenceModel

Measures = dict[str, Tensor]
NORM_FLOOR = 1e-5
NOISE = 1 << 41  # stretch of the random stream for DiffusionNFT's noise


class Objective:
    """Base of the objectives.

    replays: whether the recorded steps are predicted again, which must be in the micro-batches and with the
    kernels that sampled them. Where it is False, samples that teach nothing may be left out of a pass.
    """

    replays = False

    def __init__(self, task: Task, config: GRPOConfig, reference: ReferenceModel):
        self.task, self.config, self.reference = task, config, reference

    def window(self, step: int) -> tuple[int, int] | None:
        """The random, recorded sampling steps (start, end) of update `step`; None where there are none."""
        return None

    def lora_window(self, sizes: Iterable[tuple[int, int]]) -> tuple[float, float] | None:
        """(start, end] of the noise levels that are trained, over all latent sizes; None where all are."""
        return None

    def sampling_weights(self) -> AbstractContextManager:
        """Inside the block the model has the weights that make the rollouts."""
        return nullcontext()

    def prepared(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts of whole groups, which have their advantages, with what else the loss needs."""
        return rollouts

    def terms(self, rollout: Rollout) -> int:
        """Backward passes of a micro-batch, of whose losses the mean counts."""
        raise NotImplementedError

    def loss(self, rollout: Rollout, term: int) -> tuple[Tensor, Measures]:
        """Loss [B] of one term with gradient, and what to log of it, [B] each."""
        raise NotImplementedError

    def updated(self, step: int) -> None:
        """To be called after `step` updates."""

    def tensors(self) -> dict[str, Named]:
        """What checkpoints keep of it, {name: tensors}."""
        return {}

    def load(self, name: str, tensors: Named) -> None:
        """Read back what `tensors` gave."""

    def _reference(self, x: Tensor, time: float | Tensor, batch: dict[str, Any]) -> Tensor | None:
        """The reference model's prediction, where the divergence from it counts."""
        return self.reference.predict(x, time, batch) if self.config.kl_beta else None

    def _with_kl(
        self, loss: Tensor, measures: Measures, prediction: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Measures]:
        """Loss [B] plus kl_beta times the divergence from the reference model in velocity space."""
        if reference is None:
            return loss, measures
        kl = velocity_kl(prediction, reference)
        return loss + self.config.kl_beta * kl, {**measures, "kl": kl}


class GRPO(Objective):
    """Flow-GRPO (arXiv 2505.05470), DanceGRPO (2505.07818): the clipped ratio of the recorded steps.

    A term is one recorded step.
    """

    replays = True

    def window(self, step: int) -> tuple[int, int]:
        """The steps (start, end) that `window` of the configuration chooses for update `step`."""
        return self.config.windows.at(step)

    def lora_window(self, sizes: Iterable[tuple[int, int]]) -> tuple[float, float]:
        """(start, end] of the noise levels of all steps that any update may choose."""
        c = self.config
        ranges = [self.task.level_range(c.rollout_steps, c.windows.span, *size) for size in sizes]
        return max(start for start, _ in ranges), min(end for _, end in ranges)

    def terms(self, rollout: Rollout) -> int:
        """One for each recorded step."""
        return len(rollout.transitions)

    def loss(self, rollout: Rollout, term: int) -> tuple[Tensor, Measures]:
        """The clipped loss [B] of one recorded step, and what to log: ratio, clipped, and kl if it counts."""
        step = rollout.transitions[term]
        reference = self._reference(step.x, step.time, rollout.batch)
        prediction = self.task.predict(step.x, step.time, rollout.batch, self.config.rollout_guidance)
        log_ratio = step.log_ratio(step.replay(prediction).mean)
        result = clipped_loss(log_ratio, rollout.advantage, self.config.clip)
        measures = {"ratio": result.ratio, "clipped": result.clipped.float()}
        return self._with_kl(result.loss, measures, prediction, reference)


@dataclass(frozen=True)
class PolicyLoss:
    """loss [B] with gradient; ratio [B] and clipped [B] (bool), detached, for the log."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_loss(log_ratio: Tensor, advantage: Tensor, clip: float) -> PolicyLoss:
    """PPO's clipped objective per sample: -min(r A, clip(r, 1-c, 1+c) A), r = exp(log_ratio) [B].

    log_ratio is a mean over latent elements, not a sum, so useful clip ranges are 1e-5 to 1e-3.
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    clipped = (ratio.detach() - 1).abs() > clip
    return PolicyLoss(-gain, ratio.detach(), clipped)


class DiffusionNFT(Objective):
    """DiffusionNFT (arXiv 2509.16117): learn from clean rollouts by noising them, without log-probabilities.

    Each rollout is noised again, and the model is pulled towards an implicit positive policy and away from a
    negative one, by how good the rollout was. The rollouts come from a slowly following old policy. A term is
    one noise level; behind them stand those of the contrastive update, if there is one.
    """

    def __init__(self, task: Task, config: GRPOConfig, reference: ReferenceModel, parameters: Named):
        super().__init__(task, config, reference)
        self.old = OldPolicy(parameters, config.nft_old_max)
        self.contrastive = Contrastive(task, config) if config.contrastive.count else None

    def sampling_weights(self) -> AbstractContextManager:
        """Inside the block the model is the old policy."""
        return self.old.active()

    def prepared(self, rollouts: list[Rollout]) -> list[Rollout]:
        """With the best of each group, where the contrastive update needs it."""
        return rollouts if self.contrastive is None else with_best(rollouts, self.config.group_size)

    def terms(self, rollout: Rollout) -> int:
        """One for each noise level, then the passes of the contrastive update."""
        passes = 0 if self.contrastive is None else self.contrastive.passes(len(rollout.members))
        return self.config.nft_times + passes

    def loss(self, rollout: Rollout, term: int) -> tuple[Tensor, Measures]:
        """The loss [B] of one noise level or contrastive pass, and what to log of it."""
        c, task = self.config, self.task
        if term >= c.nft_times:
            return self.contrastive.loss(rollout, term - c.nft_times, self.terms(rollout))
        x, time = self._noised(rollout, term)
        reference = self._reference(x, time, rollout.batch)
        same = c.nft_old_max == 0 and c.inner_updates == 1  # the old weights are the present ones
        if not same:  # before the prediction with gradient: the weights are swapped in place
            with torch.no_grad(), self.old.active():
                old = task.predict(x, time, rollout.batch, c.rollout_guidance)
        prediction = task.predict(x, time, rollout.batch, c.rollout_guidance)
        old = prediction.detach() if same else old
        data, data_old = (task.data_prediction(x, time, p.float()) for p in (prediction, old))
        loss = nft_loss(data, data_old, rollout.latents, preference(rollout.advantage), c.nft_beta)
        loss = loss * task.data_weight(time)
        return self._with_kl(loss, {"nft": loss}, prediction, reference)

    def _noised(self, rollout: Rollout, term: int) -> tuple[Tensor, Tensor]:
        """The clean latents at noise level `term` of each sample: x [B,C,h,w] and its sigma or timestep [B].

        With one noise and level for a whole group, what its members share cancels in the sum over advantages.
        """
        c, x0 = self.config, rollout.latents
        share = c.group_size if c.nft_shared_noise else 1
        positions = [member // share * c.nft_times + term for member in rollout.members]
        u = row_uniform(c.seed, positions, "nft")
        level = sigma_from_uniform(u, *c.sigmas).to(x0.device).clamp(1e-3, 1 - 1e-3)
        noise = row_noise(c.seed, [NOISE + position for position in positions], tuple(x0.shape[1:]))
        return self.task.noised(x0, noise.to(x0.device), level)

    def updated(self, step: int) -> None:
        """The old policy follows."""
        self.old.follow(step)

    def tensors(self) -> dict[str, Named]:
        """The old policy's weights."""
        return {"old": self.old.values}

    def load(self, name: str, tensors: Named) -> None:
        """Go on with these as the old policy's weights."""
        self.old.values = tensors


def preference(advantage: Tensor) -> Tensor:
    """Advantage [B] in -`ADVANTAGE_MAX`..`ADVANTAGE_MAX` -> optimality probability [B] in 0..1."""
    return (advantage / ADVANTAGE_MAX / 2 + 0.5).clamp(0, 1)


def nft_loss(data: Tensor, data_old: Tensor, x0: Tensor, optimality: Tensor, beta: float) -> Tensor:
    """The loss per sample [B] (arXiv 2509.16117).

    data, data_old [B,...]: the clean latents that the present and the old weights predict (for a velocity:
    x - sigma v); optimality [B] in 0..1. The mixtures v+ = beta v + (1-beta) v_old and v- = (1+beta) v_old -
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
    return ADVANTAGE_MAX * (optimality * positive / beta + (1 - optimality) * negative / beta)


def make_objective(
    task: Task, config: GRPOConfig, reference: ReferenceModel, parameters: Named
) -> GRPO | DiffusionNFT:
    """The objective that `algorithm` names; parameters: what is trained, by name."""
    if config.algorithm == "nft":
        return DiffusionNFT(task, config, reference, parameters)
    return GRPO(task, config, reference)
