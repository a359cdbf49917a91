"""Rollouts: groups of finished samples, with the random steps that made them recorded for replay.

One micro-batch is sampled and later replayed as it is: other batch sizes choose other kernels, and then the
ratio on unchanged weights is not 1. How good the samples are and what is learnt of them stand elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ...samplers.gaussian import Transition, sde_seed
from ..runtime.random_streams import row_uniform
from ..tasks.base import Task
from ..tasks.sampling import RolloutSettings, noise_for
from .config import GRPOConfig


@dataclass(frozen=True)
class Rollout:
    """One micro-batch of samples as it goes through an update: sampled, then scored, then learnt.

    members: the samples' numbers, unique over processes and updates; batch: the condition's tensors that
    they were made from; latents [B,C,h,w]: the clean ones; transitions: the recorded random steps. visited: x
    [B,K,C,h,w] and sigma or timestep [B,K] of K states that each sample came through.
    advantage [B], keep [B] (bool, False for what teaches nothing): of `with_advantages`. best, gap: of
    `contrastive.with_best`.
    """

    members: Sequence[int]
    batch: dict[str, Any]
    latents: Tensor
    transitions: Sequence[Transition] = ()
    visited: tuple[Tensor, Tensor] | None = None
    advantage: Tensor | None = None
    keep: Tensor | None = None
    best: Tensor | None = None
    gap: Tensor | None = None


@torch.no_grad()
def collect(
    task: Task,
    make_batch: Callable[[list[int]], dict[str, Any]],
    rows: Sequence[int],
    groups: Sequence[int],
    config: GRPOConfig,
    settings: RolloutSettings,
) -> list[Rollout]:
    """`group_size` samples of each row, in micro-batches of part of a row's group or of several whole groups.

    make_batch: entry numbers to the tensors that sampling needs; rows: entry numbers; groups: a number per
    row, unique over processes and updates, that alone fixes its noise (so any split over processes makes the
    same images). settings.window None records no step (DiffusionNFT).
    """
    c, rollouts = config, []
    together = max(1, c.micro_batch // c.group_size)  # rows; an update's rows are all of one size
    for at in range(0, len(rows), together):
        some = list(rows[at : at + together])
        firsts = [group * c.group_size for group in groups[at : at + together]]
        prefix = _prefix(task, make_batch(some), firsts, settings, c.seed) if c.shared_prefix else None
        for start in range(0, c.group_size, c.micro_batch):
            numbers = range(start, min(start + c.micro_batch, c.group_size))
            batch = repeated(make_batch(some), len(numbers))
            rollouts.append(_sampled(task, batch, firsts, numbers, prefix, c, settings))
    return rollouts


def _sampled(
    task: Task,
    batch: dict[str, Any],
    firsts: Sequence[int],
    numbers: Sequence[int],
    prefix: Tensor | None,
    config: GRPOConfig,
    settings: RolloutSettings,
) -> Rollout:
    """One micro-batch: of the groups whose first samples are numbered `firsts`, each the samples `numbers`.

    prefix [groups,C,h,w]: the latents at the window's start that a group shares, if it does.
    """
    c, steps = config, (0, settings.steps)
    members = [first + number for first in firsts for number in numbers]
    if prefix is not None:
        noise, steps = prefix.repeat_interleave(len(numbers), 0), (settings.window[0], settings.steps)
    elif c.shared_noise or c.shared_prefix:
        noise = noise_for(batch, c.seed, [first for first in firsts for _ in numbers])
    else:
        noise = noise_for(batch, c.seed, members)
    states = c.contrastive.count
    visited = Visited(states, settings.steps, c.seed, members) if states else None
    generators = [torch.Generator().manual_seed(sde_seed(c.seed, member)) for member in members]
    latents, transitions = task.rollout(batch, noise, settings, generators, steps=steps, callback=visited)
    return Rollout(members, batch, latents, transitions, visited and visited.joined())


def _prefix(
    task: Task, batch: dict[str, Any], firsts: Sequence[int], settings: RolloutSettings, seed: int
) -> Tensor | None:
    """The groups' common latents [rows,C,h,w] at the window's start; None where nothing comes before it."""
    if settings.window is None or settings.window[0] == 0:
        return None
    noise = noise_for(batch, seed, firsts)
    return task.rollout(batch, noise, replace(settings, window=None), steps=(0, settings.window[0]))[0]


class Visited:
    """Keeps `count` states of every sample of a micro-batch, at random steps but the first, which is noise.

    Used as a sampler's callback.
    """

    def __init__(self, count: int, steps: int, seed: int, members: Sequence[int]):
        draws = [row_uniform(seed, list(members), f"visited {number}") for number in range(count)]
        self.steps = 1 + (torch.stack(draws, 1) * (steps - 1)).long()  # [B,K]
        self.found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        for row, number in (self.steps == event["i"]).nonzero().tolist():
            time = torch.as_tensor(event["sigma"] if "sigma" in event else event["t"])
            self.found[row, number] = (event["x"][row].float(), time)

    def joined(self) -> tuple[Tensor, Tensor]:
        """x [B,K,C,h,w] float32 and sigma or timestep [B,K]."""
        rows, count = self.steps.shape
        places = [(row, number) for row in range(rows) for number in range(count)]
        x, time = (torch.stack([self.found[place][i] for place in places]) for i in (0, 1))
        return x.unflatten(0, (rows, count)), time.to(x.device).unflatten(0, (rows, count))


def with_advantages(rollouts: Sequence[Rollout], advantage: Tensor, keep: Tensor) -> list[Rollout]:
    """The rollouts with the advantages [N] and the marks [N] (bool) of all their samples in order."""
    sizes = [len(rollout.members) for rollout in rollouts]
    parts = zip(rollouts, advantage.split(sizes), keep.split(sizes), strict=True)
    return [
        replace(rollout, advantage=a.to(rollout.latents.device), keep=k.to(rollout.latents.device))
        for rollout, a, k in parts
    ]


def kept_only(rollouts: Sequence[Rollout], micro_batch: int, group_size: int = 0) -> list[Rollout]:
    """The kept samples alone, in micro-batches anew; the last one as it is where nothing is kept.

    For objectives that replay no recorded step. group_size: no micro-batch joins samples of two groups, of
    which each has so many; 0 = any.
    """
    rows = [(rollout, row) for rollout in rollouts for row in rollout.keep.nonzero()[:, 0].tolist()]
    if not rows:
        return list(rollouts[-1:])
    sets = [rows]
    if group_size:  # a group's samples follow one another
        sets = [list(s) for _, s in groupby(rows, key=lambda at: at[0].members[at[1]] // group_size)]
    return [_joined(s[start : start + micro_batch]) for s in sets for start in range(0, len(s), micro_batch)]


def _joined(rows: Sequence[tuple[Rollout, int]]) -> Rollout:
    """One micro-batch of these rows; nothing is copied that is not among them."""
    first = rows[0][0]

    def join(values: Callable[[Rollout], Any]) -> Any:
        some = [values(rollout)[row] for rollout, row in rows]
        return torch.stack(some) if isinstance(some[0], Tensor) else some

    visited = first.visited and tuple(join(lambda r, i=i: r.visited[i]) for i in (0, 1))
    scored = {
        name: join(lambda r, name=name: getattr(r, name))
        for name in ("advantage", "keep", "best", "gap")
        if getattr(first, name) is not None
    }
    batch = {name: join(lambda r, name=name: r.batch[name]) for name in first.batch}
    return Rollout(join(lambda r: r.members), batch, join(lambda r: r.latents), (), visited, **scored)


def repeated(batch: dict[str, Any], times: int) -> dict[str, Any]:
    """Every row `times` times in a row. Those of a single row share its memory: do not write to them."""

    def repeat(value):
        if not isinstance(value, Tensor):
            return [item for item in value for _ in range(times)]
        return value.expand(times, *value.shape[1:]) if len(value) == 1 else value.repeat_interleave(times, 0)

    return {name: repeat(value) for name, value in batch.items()}


def picked(batch: dict[str, Any], places: Tensor) -> dict[str, Any]:
    """These rows ([n] indices) of every entry, tensors and lists alike."""

    def pick(value):
        return value[places.to(value.device)] if isinstance(value, Tensor) else [value[i] for i in places]

    return {name: pick(value) for name, value in batch.items()}
