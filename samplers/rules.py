"""The step rules of flow matching as formulas: (x, v, sigma, sigma_next) -> mean and std of the next latents.

Notation: sigma runs 1 (noise) -> 0 (data), x = (1-sigma) data + sigma noise, v = noise - data, so that
x0 = x - sigma v and e = x + (1-sigma) v; D = sigma - sigma_next > 0. All rules share the ODE's marginals in
the limit of small steps except `cps` (see there). No loop and no model here: those are in `flow_match.py`.

| rule | source |
|---|---|
| ode | Euler step of the probability-flow ODE |
| flow | Flow-GRPO (arXiv 2505.05470), `sde_step_with_logprob` |
| dance | DanceGRPO (arXiv 2505.07818), `flux_step` |
| cps | FlowCPS (arXiv 2509.05952), coefficient-preserving sampling |
| rf_ancestral | DDIM's posterior noise (arXiv 2010.02502, eq. 16) written in flow coordinates |
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

__all__ = ["DEFAULT_ETA", "RULES", "check_schedule", "moments", "ode_step", "resolve_eta"]

DEFAULT_ETA = MappingProxyType({"ode": 0.0, "flow": 0.7, "dance": 0.3, "cps": 0.8, "rf_ancestral": 0.7})
RULES = tuple(DEFAULT_ETA)

# cps and rf_ancestral take their noise out of sigma_next: above 1 there would be more of it than there is.
_ETA_LIMIT = {"cps": 1.0, "rf_ancestral": 1.0}


def resolve_eta(rule: str, eta: float | None) -> float:
    """The rule's noise level: `eta`, or the published default when None. Raises out of range."""
    if rule not in DEFAULT_ETA:
        raise ValueError(f"rule is {rule!r}: choose one of {', '.join(RULES)}.")
    if rule == "ode":
        return 0.0
    if eta is None:
        return DEFAULT_ETA[rule]
    limit = _ETA_LIMIT.get(rule, math.inf)
    if not 0.0 <= eta <= limit:
        raise ValueError(
            f"eta is {eta}: rule {rule} takes 0 (no noise) to {limit}, by default {DEFAULT_ETA[rule]}."
        )
    return float(eta)


def ode_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The Euler step x + v (sigma_next - sigma) of [B,...], operations in the order of ComfyUI's `euler`."""
    return x + v * (sigma_next - sigma)


def moments(
    rule: str,
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eta: float,
    sigma_max: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean (shape of x) and std (broadcasts against x) of the transition sigma -> sigma_next.

    Tensors are float32 or wider; sigmas broadcast against x. Where sigma_next is 0, std is 0 and the mean is
    x0, for every rule: the last step never leaves noise. `sigma_max` serves `flow` only.
    """
    if rule == "ode" or eta == 0:
        return ode_step(x, v, sigma, sigma_next), torch.zeros_like(sigma_next)
    last = sigma_next <= 0
    return _FORMULAS[rule](x, v, sigma, sigma_next, eta, last, sigma_max)


def _flow(x, v, sigma, sigma_next, eta, last, sigma_max):
    """s = eta sqrt(sigma / (1 - sigma)); mean = x (1 - s^2 D / 2 sigma) - v (1 + s^2 (1-sigma) / 2 sigma) D.

    At sigma 1 the denominator alone uses `sigma_max`, the schedule's second sigma (here sigma_next by
    default: sigma is 1 only at the first step).
    """
    first = sigma_next if sigma_max is None else sigma_max
    denominator = (1 - torch.where(sigma >= 1, first, sigma)).clamp(min=1e-6)
    s = torch.where(last, 0.0, eta * torch.sqrt(sigma / denominator))
    dt = sigma_next - sigma
    pull = s**2 / (2 * sigma)
    mean = x * (1 + pull * dt) + v * (1 + pull * (1 - sigma)) * dt
    return mean, s * torch.sqrt(-dt)


def _dance(x, v, sigma, sigma_next, eta, last, sigma_max):
    """std = eta sqrt(D); mean = x - v D - eta^2 D e / (2 sigma), the score being -e / sigma."""
    strength = torch.where(last, 0.0, torch.full_like(sigma, eta))
    dt = sigma_next - sigma
    noise = x + (1 - sigma) * v
    mean = ode_step(x, v, sigma, sigma_next) + 0.5 * strength**2 * dt * noise / sigma
    return mean, strength * torch.sqrt(-dt)


def _cps(x, v, sigma, sigma_next, eta, last, sigma_max):
    """s = sigma_next sin(eta pi/2); mean = x0 (1 - sigma_next) + e sqrt(sigma_next^2 - s^2).

    The noise coefficient is sigma_next exactly, but s does not shrink with the step: over many steps the
    samples lose variance. Meant for a window of a few steps.
    """
    return _renoise(x, v, sigma, sigma_next, sigma_next * math.sin(eta * math.pi / 2))


def _rf_ancestral(x, v, sigma, sigma_next, eta, last, sigma_max):
    """s = eta times the std of the posterior p(x_next | x, x0): exact noise coefficient, and consistent.

    s^2 = eta^2 sigma_next^2 (1 - (sigma_next (1-sigma) / (sigma (1-sigma_next)))^2), at sigma 1 as well.
    """
    kept = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next).clamp(min=1e-6))
    return _renoise(x, v, sigma, sigma_next, eta * sigma_next * torch.sqrt((1 - kept**2).clamp(min=0)))


def _renoise(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    x0 = x - sigma * v
    noise = x + (1 - sigma) * v
    return x0 * (1 - sigma_next) + noise * torch.sqrt((sigma_next**2 - std**2).clamp(min=0)), std


_FORMULAS = {"flow": _flow, "dance": _dance, "cps": _cps, "rf_ancestral": _rf_ancestral}


def check_schedule(rule: str, eta: float, sigmas: Sequence[float], steps: Collection[int]) -> None:
    """Refuse, before the first model call, a schedule that the rule cannot follow at the given SDE steps.

    Noise can only be added on the way down. `flow` and `dance` are Euler-Maruyama steps, stable while
    std^2 < 2 sigma; `flow` leaves that range when a run starts just below sigma 1, where its noise diverges.
    """
    if rule == "ode" or eta == 0:
        return
    for i in sorted(steps):
        sigma, sigma_next = torch.tensor(sigmas[i : i + 2], dtype=torch.float64)
        if not 0 <= sigma_next <= sigma <= 1 or sigma == 0:
            raise ValueError(
                f"sigmas go from {sigma:.4g} to {sigma_next:.4g} at step {i}: rule {rule} needs them to fall "
                "within 1 to 0; use rule ode for other schedules."
            )
        zero = torch.zeros((), dtype=torch.float64)
        _, std = moments(rule, zero, zero, sigma, sigma_next, eta)
        if rule in ("flow", "dance") and std**2 >= 2 * sigma:
            raise ValueError(
                f"rule {rule} with eta {eta:g} is unstable at step {i} (sigma {sigma:.4g} to "
                f"{sigma_next:.4g}, noise {std:.3g}): use rule rf_ancestral, a lower eta, more steps, "
                "or start the SDE window later."
            )
