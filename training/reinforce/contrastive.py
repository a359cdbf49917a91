"""Learning from a group's best try: where the others went wrong, they are shown the way to it.

Every try that came out worse than the best of its group is learnt at states that it came through: away from
where it ended, towards the best one's picture. So an expert corrects the learner at the learner's own states
(DAgger, arXiv 1011.0686), the expert being the winner that the rewards chose; that the loser counts as well
is the thought of preference learning (DPO, arXiv 2305.18290). No wanted picture is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import supervised as states
from .rollout import Rollout, picked


def aimed(
    rollouts: Sequence[Rollout], worth: Sequence[tuple[Tensor, Tensor]], group_size: int
) -> list[Rollout]:
    """The rollouts with `aim`, the latents of each sample's group's best try, and `pull`, its weight in 0..1.

    worth: (advantage [B], keep [B]) of each rollout; whole groups follow one another. The pull is how much
    better the best is, in units of the advantage (standard deviations of the reward), 1 at most; 0 for the
    best itself and for samples that are not kept.
    """
    advantage, keep = (
        torch.cat(column).unflatten(0, (-1, group_size)) for column in zip(*worth, strict=True)
    )
    top, best = torch.where(keep, advantage, -torch.inf).max(1)
    pull = torch.where(keep, (top[:, None] - advantage).clamp(0, 1), 0.0).flatten()
    latents = torch.cat([rollout.latents for rollout in rollouts])
    winners = torch.arange(len(best)) * group_size + best
    aim = latents[winners.repeat_interleave(group_size).to(latents.device)]
    sizes = [len(rollout.latents) for rollout in rollouts]
    parts = zip(rollouts, aim.split(sizes), pull.to(latents.device).split(sizes), strict=True)
    return [replace(rollout, aim=a, pull=p) for rollout, a, p in parts]


def passes(config: Any, samples: int) -> int:
    """Forward passes for the states of so many samples, none of more rows than a micro-batch."""
    return -(-config.contrastive.count // _together(config, samples))


def objective(trainer: Any, rollout: Rollout, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [B] of pass `number`, and what to log.

    Over its states the mean of how much nearer the prediction is to the try's own end than to the winner,
    times the pull. The two squared errors' difference is linear in the prediction, so what winner and try
    have in common (the model's own blur and drift) has no gradient. Imitation of the winner alone feeds on it
    and collapses. All passes together weigh as much as one term, whatever the micro-batch is.
    """
    c = trainer.config
    places = rollout.pull.nonzero()[:, 0].cpu()
    if not len(places):  # every pass needs a graph
        places = torch.zeros(1, dtype=torch.long)
    together, of = _together(c, len(rollout.members)), places.to(rollout.pull.device)
    states_of_pass = slice(number * together, (number + 1) * together)
    x, time = (values[of, states_of_pass] for values in rollout.visited)
    count = x.shape[1]
    batch = picked(rollout.batch, places.repeat_interleave(count))
    ends = [latents[of.repeat_interleave(count)].float() for latents in (rollout.aim, rollout.latents)]
    towards, back = states.errors(trainer, batch, x.flatten(0, 1), time.flatten(), ends)
    nearer = (towards - back).unflatten(0, (-1, count)).mean(1)
    loss = torch.zeros_like(rollout.pull).index_put((of,), rollout.pull[of] * nearer)
    # gradients.py takes the mean over the terms of a rollout.
    share = count / c.contrastive.count * trainer.terms(rollout) / (c.nft_times + 1)
    return c.contrastive.weight * share * loss, {"winner": loss}


def _together(config: Any, samples: int) -> int:
    """States of each sample in one pass."""
    return max(1, min(config.contrastive.count, config.micro_batch // samples))
