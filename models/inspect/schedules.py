"""Noise schedules side by side: DDPM/DDIM alphas against flow-matching sigmas, and where steps fall.

All are brought to one scale, the share of noise in what the model sees: an image with data x and noise n as
a x + s n has the share s / (a + s). Flow matching has a = 1 - sigma, s = sigma, so its share is sigma; DDPM
has a = sqrt(alpha), s = sqrt(1 - alpha); ComfyUI's sigmas of Stable Diffusion mean x + sigma n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...samplers import ddim, schedule
from . import drawing
from .drawing import Line

KINDS = ("auto", "flow", "eps")


@dataclass(frozen=True)
class Steps:
    """A run's noise share before each step and after the last, [n + 1], falling; the formula it has."""

    name: str
    shares: Tensor


def ddpm_share(alphas: Tensor) -> Tensor:
    """The noise share of cumulative alphas, any shape."""
    noise, data = (1 - alphas).sqrt(), alphas.sqrt()
    return noise / (noise + data)


def given_share(sigmas: Tensor, kind: str = "auto") -> Tensor:
    """The noise share of ComfyUI's SIGMAS. auto: `eps` (x + sigma n) if one is above 1, else `flow`."""
    if kind == "eps" or (kind == "auto" and float(sigmas.max()) > 1.0):
        return sigmas / (1 + sigmas)
    return sigmas


def compared(steps: int, height: int, width: int, given: Sequence[tuple[Tensor, str]] = ()) -> list[Steps]:
    """The schedules of one image size in pixels: DDIM, flow matching without and with its shift, those given.

    given: (SIGMAS, kind) pairs. Raises ValueError for less than one step, an empty schedule, an unknown kind.
    """
    tokens = schedule.token_count(math.ceil(height / 8), math.ceil(width / 8))
    shift = math.exp(schedule.dynamic_mu(tokens))
    found = [
        Steps(f"DDIM, {steps} steps (Stable Diffusion)", ddpm_share(ddim.schedule(steps).alphas)),
        Steps(f"flow matching, {steps} steps, no shift", schedule.sigmas(steps)),
        Steps(
            f"flow matching, shift {shift:.3g} of {tokens} tokens ({width} x {height})",
            schedule.sigmas(steps, seq_len=tokens),
        ),
    ]
    for number, (sigmas, kind) in enumerate(given, start=1):
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}: choose one of {', '.join(KINDS)}.")
        if sigmas.ndim != 1 or len(sigmas) < 2:
            raise ValueError(f"sigmas_{number} has shape {list(sigmas.shape)}: give one step or more.")
        shares = given_share(sigmas.detach().float().cpu(), kind)
        found.append(Steps(f"sigmas_{number}, {len(sigmas) - 1} steps", shares))
    return found


def report(runs: Sequence[Steps]) -> str:
    """Of each schedule the noise share at every step, and how many steps are spent above one half."""
    lines = []
    for run in runs:
        above = int((run.shares[:-1] > 0.5).sum())
        lines.append(f"{run.name}: {above} of {len(run.shares) - 1} steps begin with more noise than image")
        lines.append("  " + " ".join(f"{value:.3f}" for value in run.shares.tolist()))
    return "\n".join(lines)


def image(runs: Sequence[Steps], height: int, width: int) -> Tensor:
    """Three plots as IMAGE [1,H,960,3]: what is mixed, where steps fall, how the shift grows with tokens."""
    return drawing.stacked([_mixed(), _fallen(runs), _shifts(height, width)])


def _mixed():
    alphas = ddim.alphas_cumprod()
    times = torch.linspace(0, 1, len(alphas)).tolist()
    lines = [
        Line("DDPM: image, sqrt(alpha)", times, alphas.sqrt().tolist()),
        Line("DDPM: noise, sqrt(1 - alpha)", times, (1 - alphas).sqrt().tolist()),
        Line("flow matching: image, 1 - sigma", [0, 1], [1, 0]),
        Line("flow matching: noise, sigma", [0, 1], [0, 1]),
    ]
    return drawing.plot(
        lines,
        title="How much image and noise are mixed: a circle (DDPM) against a straight line (flow matching)",
        x_name="time: timestep / 1000, and sigma",
        x_range=(0, 1),
        y_range=(0, 1),
    )


def _fallen(runs: Sequence[Steps]):
    lines = [
        Line(run.name, [k / (len(run.shares) - 1) for k in range(len(run.shares))], run.shares.tolist(), True)
        for run in runs
    ]
    return drawing.plot(
        lines,
        title="Where the steps fall: share of noise in the image, before each step and after the last",
        x_name="part of the run",
        x_range=(0, 1),
        y_range=(0, 1),
        height=380,
    )


def _shifts(height: int, width: int):
    tokens = schedule.token_count(math.ceil(height / 8), math.ceil(width / 8))
    most = max(4608, tokens)
    grid = [1 + k * (most - 1) / 200 for k in range(201)]
    shifts = [math.exp(schedule.dynamic_mu(round(count))) for count in grid]
    here = math.exp(schedule.dynamic_mu(tokens))
    lines = [
        Line("FLUX's shift, exp(mu)", grid, shifts),
        Line(f"this image: {tokens} tokens, shift {here:.3g}", [tokens], [here], dots=True),
    ]
    return drawing.plot(
        lines,
        title="The shift of the real token count: larger images spend more steps in the noise",
        x_name="tokens of the image that is denoised (16 x 16 pixels each)",
        x_range=(0, most),
        y_range=(0, math.ceil(shifts[-1])),
        height=280,
    )
