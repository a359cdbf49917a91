"""Rollouts: groups of finished pictures, with the random steps that made them recorded for replay.

One micro-batch is sampled and later replayed as it is: other batch sizes choose other kernels, and then the
ratio on unchanged weights is not 1. What the pictures are worth and what is learnt stand elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...samplers.gaussian import sde_seed
from ..data.dataset import latents_like
from ..runtime.random_streams import row_noise, row_uniform
from ..tasks.base import Task
from ..tasks.sampling import Recorded, RolloutSettings


@dataclass(frozen=True)
class Rollout:
    """One micro-batch: the condition's tensors as they were fed, the clean latents, the recorded steps.

    members: the samples' numbers, unique over processes and updates. visited: x [B,K,C,h,w] and sigma or
    timestep [B,K] of K states that each try came through. aim [B,C,h,w], pull [B]: of `winners.aimed`.
    """

    members: Sequence[int]
    batch: dict[str, Any]
    latents: Tensor
    transitions: Sequence[Recorded] = ()
    visited: tuple[Tensor, Tensor] | None = None
    aim: Tensor | None = None
    pull: Tensor | None = None


@torch.no_grad()
def collect(
    task: Task,
    make_batch: Callable[[list[int]], dict[str, Any]],
    rows: Sequence[int],
    groups: Sequence[int],
    *,
    group_size: int,
    micro_batch: int,
    settings: RolloutSettings,
    seed: int,
    shared_noise: bool = False,
    shared_prefix: bool = False,
    states: int = 0,
) -> list[Rollout]:
    """`group_size` samples of each row, in micro-batches of part of a row's group or of several whole groups.

    rows: entry numbers; groups: a number per row, unique over processes and updates, that alone fixes its
    noise (so any split over processes makes the same images). settings.window None records nothing
    (DiffusionNFT). shared_noise: a group begins at one noise; shared_prefix: it also shares the steps before
    the window. states: of each sample to keep, at random steps (but the first, which is noise).
    """
    rollouts = []
    together = max(1, micro_batch // group_size)  # rows; an update's rows are all of one size
    for first in range(0, len(rows), together):
        some = list(rows[first : first + together])
        starts = [group * group_size for group in groups[first : first + together]]
        prefix = _prefix(task, make_batch(some), starts, settings, seed) if shared_prefix else None
        for start in range(0, group_size, micro_batch):
            numbers = range(start, min(start + micro_batch, group_size))
            part = [member + number for member in starts for number in numbers]
            batch = repeated(make_batch(some), len(numbers))
            like = latents_like(batch)
            device = like.device
            firsts = [member for member in starts for _ in numbers]
            shape = tuple(like.shape[1:])
            steps = (0, settings.steps)
            if prefix is None:
                shared = shared_noise or shared_prefix
                noise = row_noise(seed, firsts if shared else part, shape).to(device)
            else:
                noise = prefix.repeat_interleave(len(numbers), 0)
                steps = (settings.window[0], settings.steps)
            notes = Visited(states, settings.steps, seed, part) if states else None
            generators = [torch.Generator().manual_seed(sde_seed(seed, member)) for member in part]
            latents, transitions = task.rollout(
                batch, noise, settings, generators, steps=steps, callback=notes
            )
            rollouts.append(Rollout(part, batch, latents, transitions, notes and notes.joined()))
    return rollouts


class Visited:
    """Keeps `count` states of every sample of a micro-batch; used as a sampler's callback."""

    def __init__(self, count: int, steps: int, seed: int, members: Sequence[int]):
        draws = [row_uniform(seed, list(members), f"visited {number}") for number in range(count)]
        self.steps = 1 + (torch.stack(draws, 1) * (steps - 1)).long()  # [B,K]: noise is where all begin
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


def _prefix(
    task: Task, batch: dict[str, Any], members: Sequence[int], settings: RolloutSettings, seed: int
) -> Tensor | None:
    """The groups' common latents [rows,C,h,w] at the window's start; None where nothing comes before it."""
    if settings.window is None or settings.window[0] == 0:
        return None
    like = latents_like(batch)
    noise = row_noise(seed, members, tuple(like.shape[1:])).to(like.device)
    return task.rollout(batch, noise, replace(settings, window=None), steps=(0, settings.window[0]))[0]


def kept_only(rollouts: Sequence[Rollout], parts: Sequence[Tensor]) -> list[tuple[Rollout, Tensor]]:
    """The samples at these places ([n] indices over all micro-batches together), a micro-batch per part.

    Returns them with their places. For objectives that replay no recorded step, which may leave samples out.
    """
    owners = [(rollout, row) for rollout in rollouts for row in range(len(rollout.members))]

    def rows(places: Tensor, values: Callable[[Rollout], Any]) -> Any:
        """These rows alone of every rollout's values; nothing is copied that is not kept."""
        some = [values(rollout)[row] for rollout, row in (owners[place] for place in places.tolist())]
        return torch.stack(some) if isinstance(some[0], Tensor) else some

    out = []
    for places in parts:
        batch = {name: rows(places, lambda r, name=name: r.batch[name]) for name in rollouts[0].batch}
        beside = {"latents": rows(places, lambda r: r.latents)}
        if rollouts[0].visited is not None:
            beside["visited"] = tuple(rows(places, lambda r, i=i: r.visited[i]) for i in (0, 1))
            beside["aim"], beside["pull"] = rows(places, lambda r: r.aim), rows(places, lambda r: r.pull)
        out.append((Rollout(rows(places, lambda r: r.members), batch, **beside), places))
    return out


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
