"""The contrastive update: samples of a group are led towards its best one, at states that they came through.

Every sample that came out worse than the best of its group is learnt at some of the states it passed: away
from where it ended, towards the best one's latents. So an expert corrects the learner at the learner's own
states (DAgger, arXiv 1011.0686), the expert being the sample that the rewards chose; that the worse one
counts as well is the thought of preference learning (DPO, arXiv 2305.18290). No target image is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..tasks.base import Task
from ..tasks.losses import weighted_mse
from .config import GRPOConfig
from .rollout import Rollout, picked

FLOOR = 0.05  # a drift that is left at the end cannot be undone there: its error must not weigh without limit


def with_best(rollouts: Sequence[Rollout], group_size: int) -> list[Rollout]:
    """The rollouts, which have advantages and hold whole groups one after another, with `best` and `gap`.

    best [B,C,h,w]: the latents of each sample's group's best. gap [B] in 0..1: how much better that is, in
    units of the advantage (standard deviations of the reward), 1 at most; 0 for the best itself and for
    samples that are not kept.
    """
    advantage, keep, latents = (
        torch.cat([getattr(rollout, name) for rollout in rollouts])
        for name in ("advantage", "keep", "latents")
    )
    advantage, keep = (values.unflatten(0, (-1, group_size)) for values in (advantage, keep))
    top, place = torch.where(keep, advantage, -torch.inf).max(1)
    gap = torch.where(keep, (top[:, None] - advantage).clamp(0, 1), 0.0).flatten()
    best = torch.arange(len(place), device=place.device) * group_size + place
    best = latents[best.repeat_interleave(group_size)]
    sizes = [len(rollout.latents) for rollout in rollouts]
    parts = zip(rollouts, best.split(sizes), gap.split(sizes), strict=True)
    return [replace(rollout, best=b, gap=g) for rollout, b, g in parts]


class Contrastive:
    """The contrastive loss, computed in passes over some of the visited states each."""

    def __init__(self, task: Task, config: GRPOConfig):
        self.task, self.config = task, config

    def passes(self, samples: int) -> int:
        """Forward passes for the states of so many samples, none of more rows than a micro-batch."""
        return -(-self.config.contrastive.count // self._together(samples))

    def loss(self, rollout: Rollout, number: int, terms: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [B] of pass `number`, and what to log. terms: of the rollout, of whose losses the mean counts.

        Over its states the mean of how much nearer the prediction is to the sample's own end than to the best
        one's, times the gap. The two squared errors' difference is linear in the prediction, so what both
        have in common (the model's own blur and drift) has no gradient. Imitation of the best alone feeds on
        it and collapses. All passes together weigh as much as one other term, whatever the micro-batch is.
        """
        c = self.config
        places = rollout.gap.nonzero()[:, 0].cpu()
        if not len(places):  # every pass needs a graph
            places = torch.zeros(1, dtype=torch.long)
        together, of = self._together(len(rollout.members)), places.to(rollout.gap.device)
        states = slice(number * together, (number + 1) * together)
        x, time = (values[of, states] for values in rollout.visited)
        count = x.shape[1]
        batch = picked(rollout.batch, places.repeat_interleave(count))
        ends = [latents[of.repeat_interleave(count)].float() for latents in (rollout.best, rollout.latents)]
        towards, back = self._errors(batch, x.flatten(0, 1), time.flatten(), ends)
        nearer = (towards - back).unflatten(0, (-1, count)).mean(1)
        loss = torch.zeros_like(rollout.gap).index_put((of,), rollout.gap[of] * nearer)
        share = count / c.contrastive.count * terms / (c.nft_times + 1)
        return c.contrastive.weight * share * loss, {"winner": loss}  # the name in every rewards.jsonl so far

    def _errors(self, batch: dict, x: Tensor, time: Tensor, ends: Sequence[Tensor]) -> list[Tensor]:
        """Squared error per row [B] of the clean latents predicted at x [B,C,h,w], time [B] towards each end.

        Divided by the task's noise share, so that it weighs about as a velocity's or epsilon's does.
        """
        prediction = self.task.predict(x, time, batch, self.config.rollout_guidance)
        data = self.task.data_prediction(x.float(), time, prediction.float())
        cells, share = self.task.cells(batch, x), self.task.noise_share(time) + FLOOR
        return [weighted_mse(data, end, cells, batch.get("weight")) / share for end in ends]

    def _together(self, samples: int) -> int:
        """States of each sample in one pass."""
        return max(1, min(self.config.contrastive.count, self.config.micro_batch // samples))
