"""One Gaussian transition x -> x' = mean + std * noise: its noise, density, ratio and divergence.

Shared by `flow_match.py` and `ddim.py`, whose rules only differ in how mean and std come about. Every density
here is the mean over the non-batch elements, the convention of all published GRPO code for images (their clip
ranges, 1e-4 and the like, only make sense with it). A deterministic transition (std 0) has no density: its
log-probability, ratio and divergence are defined as 0, so that it adds nothing to a loss.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Step",
    "Transition",
    "Window",
    "draw_noise",
    "kl",
    "log_ratio",
    "mean_log_prob",
    "sde_seed",
    "velocity_kl",
    "window_steps",
]

Moments = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Generators = torch.Generator | Sequence[torch.Generator] | None
Window = tuple[int, int] | Collection[int] | None


class Step(NamedTuple):
    """One step's result; float32 (float64 if the input was), except `x_next`, which has x's dtype."""

    x_next: Tensor  # the next latents, rounded to the storage dtype where one was asked for
    mean: Tensor  # mean of the transition, shape of x
    std: Tensor  # its standard deviation, broadcasts against x: 0-dim, or [B,1,...,1] for per-sample sigmas
    x0: Tensor  # the data prediction at x
    log_prob: Tensor  # [B], of x_next under (mean, std)


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if a tensor (of any shape) is: half precision overflows in the SDE coefficients."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def per_sample(value: float | Tensor, x: Tensor, name: str) -> Tensor:
    """A scalar or [B] value as a tensor that broadcasts against x [B,...].

    Scalars stay 0-dim where they are: a 0-dim CPU tensor meets a GPU tensor without a copy or a wait. Raises
    ValueError for any other shape.
    """
    value = torch.as_tensor(value, dtype=work_dtype(x))
    if value.numel() == 1:
        return value.reshape(())
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} but x has shape {tuple(x.shape)}: give one value, or one "
            f"per sample [{x.shape[0]}]."
        )
    return value.to(x.device).reshape(-1, *[1] * (x.ndim - 1))


def draw_noise(x: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise of x's shape and device, drawn in float32 where the generator lives.

    A CPU generator gives the same noise on every device. A list has one generator per sample, so that a
    sample's noise does not depend on its neighbours in the batch. None uses torch's global CPU generator.
    Raises ValueError unless a list of generators has one per sample.
    """
    if isinstance(generator, Sequence):
        if len(generator) != x.shape[0]:
            raise ValueError(
                f"generator is a list of {len(generator)} but the batch has {x.shape[0]} samples: give one "
                "generator, or one per sample."
            )
        return torch.cat([draw_noise(x[i : i + 1], one) for i, one in enumerate(generator)])
    device = generator.device if generator is not None else "cpu"
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=torch.float32)
    return noise.to(device=x.device, dtype=work_dtype(x))


def sde_seed(seed: int, stream: int = 0) -> int:
    """The seed of a run's SDE noise, from the run's own seed and a second number that picks another path.

    It never equals `seed` in practice: a generator seeded alike would draw the starting noise a second
    time, and the first SDE step would then add x's own noise to x.
    """
    digest = hashlib.sha256(f"diptych-sde:{seed}:{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def window_steps(window: Window, steps: int) -> frozenset[int]:
    """The step indices of an SDE window over `steps` steps.

    None is every step; a tuple `(start, end)` is `start <= i < end`, cut at the last step; a set, frozenset
    or range lists indices. A list is refused, since `[0, 2]` could mean either.
    """
    if window is None:
        return frozenset(range(steps))
    if isinstance(window, tuple) and len(window) == 2:
        start, end = window
        if start < 0 or end < start:
            raise ValueError(f"window is {window}: give (start, end) with 0 <= start <= end, in steps.")
        if start >= steps and end > start:
            raise ValueError(f"window starts at step {start} but the schedule has steps 0 to {steps - 1}.")
        return frozenset(range(start, min(end, steps)))
    if not isinstance(window, (set, frozenset, range)):
        raise ValueError(f"window is {window!r}: give a tuple (start, end) or a set of step indices.")
    outside = sorted(i for i in window if not 0 <= i < steps)
    if outside:
        raise ValueError(f"window holds step {outside[0]} but the schedule has steps 0 to {steps - 1}.")
    return frozenset(window)


def batch_mean(values: Tensor) -> Tensor:
    """Mean over all but the first axis: [B,...] -> [B]."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def _where_random(std: Tensor, values: Tensor) -> Tensor:
    return torch.where(std > 0, values, torch.zeros_like(values))


def _positive(std: Tensor) -> Tensor:
    return torch.where(std > 0, std, torch.ones_like(std))


def mean_log_prob(x_next: Tensor, mean: Tensor, std: Tensor, *, normalized: bool = True) -> Tensor:
    """Gaussian log-density of x_next, mean over non-batch elements: [B].

    `normalized=False` gives `-(x_next - mean)^2`, the un-normalised score that FlowCPS trains with.
    """
    squared = (x_next - mean) ** 2
    if normalized:
        scale = _positive(std)
        squared = squared / (2 * scale**2) + torch.log(scale) + 0.5 * math.log(2 * math.pi)
    return batch_mean(_where_random(std, -squared))


def log_ratio(
    mean: Tensor, mean_old: Tensor, x_next: Tensor, std: Tensor, *, normalized: bool = True
) -> Tensor:
    """log p(x_next | mean) - log p(x_next | mean_old) per element mean: [B].

    Computed from the difference of the means, not of two log-densities thousands of times larger: exactly 0
    for equal means, and no cancellation.
    """
    product = (mean - mean_old) * (2 * x_next.to(mean.dtype) - mean - mean_old)
    if normalized:
        product = product / (2 * _positive(std) ** 2)
    return batch_mean(_where_random(std, product))


def kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std) || N(mean_ref, std)) per element mean: `mean (mean - mean_ref)^2 / (2 std^2)`, [B].

    `std` is the whole standard deviation of the step. Flow-GRPO leaves the step length out of it, which
    multiplies its KL weight by the step length: divide a published weight accordingly.
    """
    return batch_mean(_where_random(std, (mean - mean_ref) ** 2 / (2 * _positive(std) ** 2)))


def velocity_kl(v: Tensor, v_ref: Tensor) -> Tensor:
    """`mean (v - v_ref)^2` per sample, [B]: a divergence that depends on neither rule, eta nor step count."""
    dtype = work_dtype(v, v_ref)
    return batch_mean((v.to(dtype) - v_ref.to(dtype)) ** 2)


@dataclass(frozen=True)
class Transition:
    """A recorded random step of any rule: all that is needed to score it again under other weights.

    index: of the step. time: what the model was called with beside x, a sigma or a timestep. x and x_next are
    what the model saw and what was fed forward, in the storage dtype; mean is float32. moments: the step's
    rule, from (x, prediction) to (mean, std, x0). normalized: as of `mean_log_prob`.
    """

    index: int
    time: float | int
    x: Tensor
    x_next: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor
    moments: Moments
    normalized: bool = True

    def replay(self, prediction: Tensor) -> Step:
        """The same transition under another prediction at (x, time): mean, x0, log_prob, differentiable."""
        mean, std, x0 = self.moments(self.x, prediction)
        density = mean_log_prob(self.x_next.to(mean.dtype), mean, std, normalized=self.normalized)
        return Step(self.x_next, mean, std, x0, density)

    def log_ratio(self, mean: Tensor) -> Tensor:
        """log p_new - log p_old [B] for a replayed mean, without the cancellation of a subtraction."""
        return log_ratio(mean, self.mean, self.x_next, self.std, normalized=self.normalized)
