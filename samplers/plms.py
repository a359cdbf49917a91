"""PLMS as glid-3-xl-stable samples: pseudo linear multistep after three pseudo Runge-Kutta steps.

Liu et al., "Pseudo Numerical Methods for Diffusion Models", 2022, in the form of guided-diffusion's forks.
That is not diffusers' PNDMScheduler: half steps between two timesteps take the mean of both and of their
alphas, and the result is the last step's x0 from its raw epsilon. Their plain DDIM is here too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .ddim import alphas_cumprod

TRAINED = 1000  # timesteps, of Stable Diffusion's scaled_linear betas, which glid calls linear
FEWEST = 4  # steps, for the history of the last formula

Epsilon = Callable[[Tensor, Tensor], Tensor]


def plms_timesteps(steps: int) -> Tensor:
    """The timesteps of a run, rising, evenly from 0 to 999, int64 [steps].

    Raises ValueError below four steps.
    """
    if steps != int(steps) or not FEWEST <= steps <= TRAINED:
        raise ValueError(f"steps is {steps}: PLMS takes {FEWEST} to {TRAINED}.")
    return torch.tensor([round(i * (TRAINED - 1) / (steps - 1)) for i in range(int(steps))])


def plms_levels(steps: int) -> dict[float, float]:
    """{timestep: cumulative alpha} of everything that `plms` asks the model at, half steps too."""
    times = plms_timesteps(steps).double()
    alphas = alphas_cumprod()[times.long()]
    points = [*zip(times.tolist(), alphas.tolist(), strict=True)]
    half = [
        ((points[i][0] + points[i - 1][0]) / 2, (points[i][1] + points[i - 1][1]) / 2) for i in (-1, -2, -3)
    ]
    return dict(points + half)


def ddim_levels(steps: int) -> dict[float, float]:
    """{timestep: cumulative alpha} of everything that `ddim` asks the model at."""
    times = ddim_timesteps(steps)
    return dict(zip(times.double().tolist(), alphas_cumprod()[times].tolist(), strict=True))


def ddim_timesteps(steps: int) -> Tensor:
    """0, k, 2k, ..., int64 [steps], all below 1000. Raises ValueError where no whole k does that."""
    if steps == int(steps) and steps >= 1:
        for stride in range(1, TRAINED + 1):
            places = range(0, TRAINED, stride)
            if len(places) == steps:
                return torch.tensor(list(places))
    raise ValueError(
        f"steps is {steps}: glid's DDIM takes numbers of even strides through 1000, such as 10, 50 or 250."
    )


@torch.no_grad()
def plms(
    epsilon: Epsilon,
    noise: Tensor,
    steps: int = 50,
    *,
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """x0 [B,...] from `noise` at timestep 999; steps + 9 calls of epsilon(x, t), t a 0-dim tensor.

    callback(step, steps, x0) after every step.
    """
    times = plms_timesteps(steps).double()
    alphas = alphas_cumprod(dtype=torch.float64)[times.long()]
    x, history = noise, []
    for step, index in enumerate(reversed(range(len(times)))):
        at = _Point(times[index], alphas[index])
        if len(history) < FEWEST - 1:
            before = _Point(times[index - 1], alphas[index - 1])
            mean = raw = _runge_kutta(epsilon, x, at, before)
        else:
            raw = epsilon(x, at.time)
            third, second, first = history
            mean = (55 * raw - 59 * first + 37 * second - 9 * third) / 24
        x0 = at.x0(x, raw)
        if callback is not None:
            callback(step, len(times), x0)
        if index:
            x = at.moved(x, mean, _Point(times[index - 1], alphas[index - 1]))
        history = [*history, raw][-(FEWEST - 1) :]
    return x0


class _Point:
    """A timestep and its cumulated alpha."""

    def __init__(self, time: Tensor, alpha: Tensor):
        self.time, self.alpha = time, alpha

    def x0(self, x: Tensor, epsilon: Tensor) -> Tensor:
        return (x - float((1 - self.alpha).sqrt()) * epsilon) / float(self.alpha.sqrt())

    def moved(self, x: Tensor, epsilon: Tensor, to: _Point) -> Tensor:
        """x [B,...] at another point, along epsilon (a DDIM step)."""
        return float(to.alpha.sqrt()) * self.x0(x, epsilon) + float((1 - to.alpha).sqrt()) * epsilon


def _runge_kutta(epsilon: Epsilon, x: Tensor, at: _Point, before: _Point) -> Tensor:
    """The mean epsilon of four calls: here, twice halfway, and at the next timestep."""
    half = _Point((at.time + before.time) / 2, (at.alpha + before.alpha) / 2)
    first = epsilon(x, at.time)
    second = epsilon(at.moved(x, first, half), half.time)
    third = epsilon(at.moved(x, second, half), half.time)
    fourth = epsilon(at.moved(x, third, before), before.time)
    return (first + 2 * second + 2 * third + fourth) / 6


@torch.no_grad()
def ddim(
    epsilon: Epsilon,
    noise: Tensor,
    steps: int = 50,
    *,
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """x0 [B,...] by DDIM without noise of its own (eta 0): diffusers' with leading spacing, offset 0."""
    times = ddim_timesteps(steps).double()
    alphas = alphas_cumprod(dtype=torch.float64)[times.long()]
    x = noise
    for step, index in enumerate(reversed(range(len(times)))):
        at = _Point(times[index], alphas[index])
        found = epsilon(x, at.time)
        x0 = at.x0(x, found)
        if callback is not None:
            callback(step, len(times), x0)
        if index:
            x = at.moved(x, found, _Point(times[index - 1], alphas[index - 1]))
    return x0
