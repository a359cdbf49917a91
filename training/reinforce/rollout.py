"""Rollouts: groups of finished pictures, with the random steps that made them recorded for replay.

One micro-batch is sampled and later replayed as it is: other batch sizes choose other kernels, and then the
ratio on unchanged weights is not 1. What the pictures are worth and what is learnt stand elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...models.lora.delta import in_window
from ...samplers import ddim, flow_match, schedule
from ...samplers.gaussian import Step, per_sample, sde_seed
from ..data.dataset import latents_like
from ..tasks.adapters import switched_off
from ..tasks.losses import diffused, noised, row_noise, row_uniform


class Recorded(Protocol):
    """A random step of `flow_match` or `ddim`, both of which replay under a new prediction."""

    index: int
    x: Tensor
    x_next: Tensor
    mean: Tensor
    std: Tensor
    time: float | int

    def replay(self, prediction: Tensor) -> Step: ...

    def log_ratio(self, mean: Tensor) -> Tensor: ...


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


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled. eta None is the rule's own default; lora_window: (start, end] in noise levels
    outside of which the LoRA is off."""

    steps: int
    guidance: float
    rule: str = "flow"
    eta: float | None = None
    storage_dtype: torch.dtype = torch.float32
    shared_noise: bool = False
    shared_prefix: bool = False
    lora_window: tuple[float, float] | None = None


@contextmanager
def _lora_at(task: Any, level: float, window: tuple[float, float] | None) -> Iterator[None]:
    """The task's model as loaders run its LoRA at this noise level: outside the window without it."""
    outside = contextlib.nullcontext() if in_window(level, window) else switched_off(task.module)
    with outside:
        yield


class FlowPolicy:
    """Sampling and predicting with a velocity task (Fill, Kontext)."""

    def __init__(self, task):
        self.task = task

    def predict(self, x: Tensor, time: float | Tensor, batch: dict[str, Any], guidance: float) -> Tensor:
        """The velocity at (x, sigma); differentiable in the weights."""
        return self.task.host.velocity(x.float(), time, self.task.condition(batch, guidance))

    def noised(self, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(x, time) at noise levels [B] in 0..1, which here are the sigmas."""
        return noised(x0, noise, level)[0], level

    def data(self, x: Tensor, time: Tensor, prediction: Tensor) -> Tensor:
        """The clean latents that a prediction at (x, time) amounts to."""
        return x - per_sample(time, x, "time") * prediction

    def data_weight(self, time: Tensor) -> Tensor:
        """What keeps errors of `data` comparable over the noise levels [B]."""
        return torch.ones_like(time)

    def noise_share(self, time: Tensor) -> Tensor:
        """The squared error of `data` for each of the velocity, at sigmas [B]."""
        return time**2

    def run(
        self,
        batch: dict[str, Any],
        noise: Tensor,
        sampling: Sampling,
        window: tuple[int, int] | None,
        generators: Sequence[torch.Generator] | None,
        steps: tuple[int, int] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> tuple[Tensor, list[Recorded]]:
        """Sample steps [start, end) of the schedule (all by default); window None is the plain ODE.

        callback: as of `flow_match.sample`.
        """
        sigmas = schedule.sigmas(sampling.steps, seq_len=schedule.token_count(*noise.shape[-2:]))
        start, end = steps or (0, sampling.steps)
        condition = self.task.condition(batch, sampling.guidance)
        inner = None if window is None else (window[0] - start, window[1] - start)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            with _lora_at(self.task, float(sigma), sampling.lora_window):
                return self.task.host.velocity(x, sigma, condition)

        return flow_match.sample(
            velocity,
            noise,
            sigmas[start : end + 1],
            rule="ode" if window is None else sampling.rule,
            eta=None if window is None else sampling.eta,
            window=inner,
            generator=generators,
            callback=callback,
            record=True,
            storage_dtype=sampling.storage_dtype,
        )

    def level_range(
        self, sampling: Sampling, window: tuple[int, int], height: int, width: int
    ) -> tuple[float, float]:
        """Noise levels, here sigmas, at the window's start and end; latent cells height x width."""
        sigmas = schedule.sigmas(sampling.steps, seq_len=schedule.token_count(height, width))
        return float(sigmas[window[0]]), float(sigmas[window[1]])


class EpsilonPolicy:
    """Sampling and predicting with an epsilon task (SD inpainting), by DDIM."""

    def __init__(self, task):
        self.task = task

    def predict(self, x: Tensor, time: int | Tensor, batch: dict[str, Any], guidance: float) -> Tensor:
        """The noise prediction at (x, timestep), with guidance where it is not 1."""
        return self.task.host.epsilon(x.float(), time, self.task.condition(batch, guidance))

    def noised(self, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(x, timestep) at levels [B] in 0..1, which here are shares of the training timesteps."""
        timestep = (level * len(self.task.alpha_bar)).long().clamp_max(len(self.task.alpha_bar) - 1)
        return diffused(x0, noise, self._alpha(timestep), "epsilon")[0], timestep

    def data(self, x: Tensor, time: Tensor, prediction: Tensor) -> Tensor:
        """The clean latents that a prediction at (x, timestep) amounts to."""
        alpha = per_sample(self._alpha(time), x, "alpha")
        if self.task.scheduler_config.get("prediction_type") == "v_prediction":
            return alpha.sqrt() * x - (1 - alpha).sqrt() * prediction
        return (x - (1 - alpha).sqrt() * prediction) / alpha.sqrt()

    def data_weight(self, time: Tensor) -> Tensor:
        """sqrt(alpha): at the highest noise an error of epsilon is 15 times as large in the data."""
        return self._alpha(time).sqrt()

    def noise_share(self, time: Tensor) -> Tensor:
        """The squared error of `data` for each of epsilon, at timesteps [B]."""
        alpha = self._alpha(time)
        return (1 - alpha) / alpha

    def _alpha(self, timestep: Tensor) -> Tensor:
        return self.task.alpha_bar[timestep.cpu()].to(timestep.device)

    def run(self, batch, noise, sampling, window, generators, steps=None, callback=None):
        """As `FlowPolicy.run`, callback as of `ddim.sample`; a shared prefix is not offered here."""
        if steps not in (None, (0, sampling.steps)):
            raise ValueError("shared_prefix is for flow models: switch it off for sd_inpaint.")
        condition = self.task.condition(batch, sampling.guidance)

        def epsilon(x: Tensor, t: Tensor) -> Tensor:
            level = ddim.noise_level(int(t), self.task.scheduler_config)
            with _lora_at(self.task, level, sampling.lora_window):
                return self.task.host.epsilon(x, t, condition)

        return ddim.sample(
            epsilon,
            noise,
            ddim.schedule(sampling.steps, self.task.scheduler_config),
            eta=0.0 if window is None else (1.0 if sampling.eta is None else sampling.eta),
            window=window,
            generator=generators,
            callback=callback,
            record=True,
            storage_dtype=sampling.storage_dtype,
        )

    def level_range(self, sampling, window, height, width):
        """Noise levels, here shares of the training timesteps, at the window's start and end."""
        config = self.task.scheduler_config
        timesteps = ddim.schedule(sampling.steps, config).timesteps.tolist()
        start, end = (ddim.noise_level(timesteps[index], config) for index in window)
        return start, end


def make_policy(task) -> FlowPolicy | EpsilonPolicy:
    """The policy that fits the task's prediction."""
    return EpsilonPolicy(task) if task.name == "sd_inpaint" else FlowPolicy(task)


@torch.no_grad()
def collect(
    policy: FlowPolicy | EpsilonPolicy,
    make_batch: Callable[[list[int]], dict[str, Any]],
    rows: Sequence[int],
    groups: Sequence[int],
    *,
    group_size: int,
    micro_batch: int,
    sampling: Sampling,
    window: tuple[int, int] | None,
    seed: int,
    states: int = 0,
) -> list[Rollout]:
    """`group_size` samples of each row, in micro-batches of part of a row's group or of several whole groups.

    rows: entry numbers; groups: a number per row, unique over processes and updates, that alone fixes its
    noise (so any split over processes makes the same pictures). window None records nothing (DiffusionNFT).
    states: of each try to keep, at random steps (but the first, which is noise).
    """
    rollouts = []
    together = max(1, micro_batch // group_size)  # rows; an update's rows are all of one size
    for first in range(0, len(rows), together):
        some = list(rows[first : first + together])
        starts = [group * group_size for group in groups[first : first + together]]
        prefix = _prefix(policy, make_batch, some, starts, sampling, window, seed)
        for start in range(0, group_size, micro_batch):
            numbers = range(start, min(start + micro_batch, group_size))
            part = [member + number for member in starts for number in numbers]
            batch = repeated(make_batch(some), len(numbers))
            like = latents_like(batch)
            device = like.device
            firsts = [member for member in starts for _ in numbers]
            shape = tuple(like.shape[1:])
            steps = (0, sampling.steps)
            if prefix is None:
                noise = row_noise(seed, firsts if sampling.shared_noise else part, shape).to(device)
            else:
                noise = prefix.repeat_interleave(len(numbers), 0)
                steps = (window[0], sampling.steps)
            notes = Visited(states, sampling.steps, seed, part) if states else None
            generators = [torch.Generator().manual_seed(sde_seed(seed, member)) for member in part]
            latents, transitions = policy.run(batch, noise, sampling, window, generators, steps, notes)
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


def _prefix(policy, make_batch, rows, members, sampling, window, seed) -> Tensor | None:
    """The groups' common latents [rows,C,h,w] at the window's start; None where nothing is shared."""
    if not sampling.shared_prefix or window is None or window[0] == 0:
        return None
    batch = make_batch(rows)
    like = latents_like(batch)
    noise = row_noise(seed, members, tuple(like.shape[1:])).to(like.device)
    latents, _ = policy.run(batch, noise, sampling, None, None, (0, window[0]))
    return latents


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
