"""Flow-match sampling: one step, its log-probability, and the loop, for ODE and SDE rules alike.

The loop is for inference and rollouts; `step` and `log_prob` are differentiable and are what a
policy-gradient update replays. Formulas are in `rules.py`, schedules in `schedule.py`; models that predict
epsilon on a discrete schedule belong to `ddim.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .gaussian import (
    Generators,
    Step,
    Transition,
    Window,
    draw_noise,
    kl,
    mean_log_prob,
    per_sample,
    velocity_kl,
    window_steps,
    work_dtype,
)
from .rules import DEFAULT_ETA, RULES, check_schedule, moments, resolve_eta

__all__ = [
    "DEFAULT_ETA",
    "RULES",
    "Step",
    "Transition",
    "kl",
    "log_prob",
    "sample",
    "step",
    "velocity_kl",
    "window_steps",
]

# FlowCPS trains on -(x_next - mean)^2 without the 1 / (2 std^2). Its log-ratios therefore scale with std^2
# and want a smaller clip range (1e-5); divide by 2 std^2 to compare them with the other rules'.
_UNNORMALIZED = frozenset({"cps"})


def _predict(x, v, rule, sigma, sigma_next, eta, sigma_max) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, std, x0) in the working precision."""
    if v.shape != x.shape:
        raise ValueError(
            f"v has shape {tuple(v.shape)} but x has {tuple(x.shape)}: the velocity must match x."
        )
    dtype = work_dtype(x, v)
    x, v = x.to(dtype), v.to(dtype)
    sigma, sigma_next = per_sample(sigma, x, "sigma"), per_sample(sigma_next, x, "sigma_next")
    if sigma_max is not None:
        sigma_max = per_sample(sigma_max, x, "sigma_max")
    mean, std = moments(rule, x, v, sigma, sigma_next, eta, sigma_max)
    return mean, std, x - sigma * v


def step(
    rule: str,
    x: Tensor,
    v: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    eta: float | None = None,
    noise: Tensor | None = None,
    generator: Generators = None,
    sigma_max: float | Tensor | None = None,
    storage_dtype: torch.dtype | None = None,
) -> Step:
    """One step from sigma to sigma_next: x_next = mean + std * noise.

    x, v: latents [B,...] and the velocity at (x, sigma), any float dtype; the arithmetic is float32 (or
    float64).
    sigma, sigma_next: one value, or one per sample [B]; 1 is noise, 0 is data.
    eta: noise level, by default flow 0.7, dance 0.3, cps 0.8, rf_ancestral 0.7; 0 makes every rule the ODE.
    noise: standard normal of x's shape; drawn from `generator` when None and the step is random.
    sigma_max: for `flow` at sigma 1, the schedule's second sigma; by default sigma_next, which it is then.
    storage_dtype: x_next is rounded to it before its log_prob is taken (and returned in x's dtype), so that a
    trajectory kept in bfloat16 replays exactly.

    When sigma_next is 0 the step is deterministic and x_next is x0, whatever the rule. A deterministic step's
    log_prob is 0 by definition: leave such steps out of training. x_next is treated as a constant in
    log_prob, as policy gradients need.
    """
    eta = resolve_eta(rule, eta)
    mean, std, x0 = _predict(x, v, rule, sigma, sigma_next, eta, sigma_max)
    x_next = mean
    if rule != "ode" and eta > 0:
        noise = draw_noise(x, generator) if noise is None else noise
        x_next = mean + std * noise.to(mean)
    x_next = x_next.to(storage_dtype or x.dtype).to(x.dtype)
    log_density = mean_log_prob(
        x_next.detach().to(mean.dtype), mean, std, normalized=rule not in _UNNORMALIZED
    )
    return Step(x_next, mean, std, x0, log_density)


def log_prob(
    rule: str,
    x: Tensor,
    x_next: Tensor,
    v: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    eta: float | None = None,
    sigma_max: float | Tensor | None = None,
) -> Tensor:
    """Log-probability [B] of having gone from x to x_next when the velocity is v; differentiable in v.

    The mean over non-batch elements of the Gaussian log-density, constants included. Two exceptions: `cps`
    returns `-mean (x_next - mean)^2`, un-normalised as published, and a deterministic step returns 0.
    Equals the `log_prob` of the step that produced x_next when v is the same.
    """
    eta = resolve_eta(rule, eta)
    mean, std, _ = _predict(x, v, rule, sigma, sigma_next, eta, sigma_max)
    return mean_log_prob(x_next.to(mean.dtype), mean, std, normalized=rule not in _UNNORMALIZED)


Callback = Callable[[dict[str, Any]], None]


@torch.no_grad()
def sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sigmas: Tensor,
    *,
    rule: str = "ode",
    eta: float | None = None,
    window: Window = None,
    generator: Generators = None,
    callback: Callback | None = None,
    record: bool = False,
    storage_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, list[Transition]]:
    """Run `sigmas` [n+1] from `noise` [B,...], the latents at sigmas[0]; returns the latents at sigmas[-1].

    velocity(x, sigma): the model; x in noise's dtype, sigma a 0-dim float32 tensor. Between steps the
    latents are kept in float32.
    window: the steps where an SDE rule adds noise, `(start, end)` half-open or a set of indices; the others
    are ODE steps. None is all of them. A step to sigma 0 is always deterministic.
    generator: one, or one per sample; CPU generators give the same noise on every device.
    callback: called at each step with a dict of what it starts from: i, sigma, sigma_next, x, denoised
    (x0), v.
    record: also return the random steps as a list of Transition (deterministic ones have nothing to train
    on).
    storage_dtype: recorded latents are rounded to it before they are scored and fed forward, and kept in
    it; by default noise's dtype. Steps that are not recorded stay in float32.

    Raises ValueError, before the first model call, for a schedule or window that the rule cannot follow.
    """
    eta = resolve_eta(rule, eta)
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32).cpu()
    schedule = sigmas.tolist()
    steps = len(schedule) - 1
    if steps < 1:
        raise ValueError(
            f"sigmas has {len(schedule)} values: a run needs two or more (denoise 0 has no steps)."
        )
    random = {i for i in window_steps(window, steps) if rule != "ode" and eta > 0 and schedule[i + 1] > 0}
    check_schedule(rule, eta, schedule, random)

    stored = storage_dtype or noise.dtype
    x = noise.to(work_dtype(noise))
    transitions: list[Transition] = []
    for i in range(steps):
        keep = record and i in random
        if keep:
            x = x.to(stored).to(x.dtype)
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        v = velocity(x.to(noise.dtype), sigma.to(x.device))
        result = step(
            rule if i in random else "ode",
            x,
            v,
            sigma,
            sigma_next,
            eta=eta,
            generator=generator,
            sigma_max=schedule[1],
            storage_dtype=stored if keep else None,
        )
        if callback is not None:
            callback(
                {"i": i, "sigma": sigma, "sigma_next": sigma_next, "x": x, "denoised": result.x0, "v": v}
            )
        if keep:
            transitions.append(
                Transition(
                    index=i,
                    time=schedule[i],
                    x=x.to(stored),
                    x_next=result.x_next.to(stored),
                    mean=result.mean,
                    std=result.std,
                    log_prob=result.log_prob,
                    moments=partial(
                        _predict,
                        rule=rule,
                        sigma=schedule[i],
                        sigma_next=schedule[i + 1],
                        eta=eta,
                        sigma_max=schedule[1],
                    ),
                    normalized=rule not in _UNNORMALIZED,
                )
            )
        x = result.x_next
    x = x.to(noise.dtype)
    return (x, transitions) if record else x
