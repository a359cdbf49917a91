"""DDIM sampling for models that predict epsilon (SD 1.5): one step, its log-probability, and the loop.

The same shapes as `flow_match.py`, with the cumulative alphas of a discrete schedule in the place of sigmas:
x_t = sqrt(alpha) data + sqrt(1 - alpha) noise. Formulas (12) and (16) of DDIM (arXiv 2010.02502); trained
as in DDPO (arXiv 2305.13301). Equals diffusers' DDIMScheduler step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    mean_log_prob,
    per_sample,
    window_steps,
    work_dtype,
)

__all__ = [
    "SD15",
    "Schedule",
    "Step",
    "Transition",
    "add_noise",
    "alphas_cumprod",
    "late",
    "level_of_noise",
    "log_prob",
    "noise_level",
    "sample",
    "schedule",
    "step",
]

# Keys and meanings are those of a diffusers `scheduler_config.json`.
SD15: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}


def _with_defaults(config: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**SD15, **{k: v for k, v in (config or {}).items() if k in SD15 and v is not None}}


def alphas_cumprod(config: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cumulative alphas [T] of a diffusers scheduler config, computed in `dtype`: in float32 diffusers' own.

    Missing keys are SD 1.5's. Raises ValueError for a beta schedule other than scaled_linear and linear.
    """
    config = _with_defaults(config)
    start, end, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config["beta_schedule"] == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=dtype) ** 2
    elif config["beta_schedule"] == "linear":
        betas = torch.linspace(start, end, count, dtype=dtype)
    else:
        raise ValueError(
            f"beta_schedule is {config['beta_schedule']!r}: 'scaled_linear' and 'linear' are supported."
        )
    return torch.cumprod(1 - betas, 0)


@dataclass(frozen=True)
class Schedule:
    """The timesteps a run visits and the alphas it passes: step i goes from alphas[i] to alphas[i + 1]."""

    timesteps: Tensor  # [n] int64, falling: what the model is called with
    alphas: Tensor  # [n+1] float32, rising: cumulative alphas, the last one the schedule's final alpha
    prediction_type: str = "epsilon"

    def __len__(self) -> int:
        return len(self.timesteps)


def schedule(steps: int, config: Mapping[str, Any] | None = None) -> Schedule:
    """The schedule of `steps` steps under a diffusers scheduler config; missing keys are SD 1.5's.

    The final alpha is the config's (`set_alpha_to_one`, else that of timestep 0). With `trailing` spacing and
    a step count that does not divide the training steps, diffusers aims at alphas beside the next timestep;
    here each step ends exactly where the next one starts. Raises ValueError for more steps than were trained,
    and for a spacing or beta schedule not known here.
    """
    config = _with_defaults(config)
    train_steps = config["num_train_timesteps"]
    if not 1 <= steps <= train_steps:
        raise ValueError(
            f"steps is {steps}: give 1 to {train_steps}, the timesteps the model was trained on."
        )
    alphas = alphas_cumprod(config)
    spacing, offset = config["timestep_spacing"], config["steps_offset"]
    if spacing == "leading":
        timesteps = torch.arange(steps).flip(0) * (train_steps // steps) + offset
    elif spacing == "trailing":
        grid = torch.arange(steps, dtype=torch.float64)
        timesteps = torch.round(train_steps - grid * (train_steps / steps)).long() - 1
    else:
        raise ValueError(f"timestep_spacing is {spacing!r}: 'leading' and 'trailing' are supported.")
    timesteps = timesteps.clamp(max=train_steps - 1)
    final = torch.ones(1) if config["set_alpha_to_one"] else alphas[:1]
    return Schedule(timesteps, torch.cat([alphas[timesteps], final]), config["prediction_type"])


def late(schedule: Schedule, strength: float) -> Schedule:
    """The last int(steps * strength) steps of a schedule, as diffusers' `strength` counts them; 1 is all.

    Sampling then starts from an image with noise: sqrt(alphas[0]) data + sqrt(1 - alphas[0]) noise. Raises
    ValueError for a strength outside 0..1, or one that leaves no step.
    """
    steps = len(schedule)
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}: give a number above 0, up to 1.")
    left = min(int(steps * strength), steps)
    if left < 1:
        raise ValueError(
            f"strength is {strength}, which of {steps} steps leaves none: give at least {1 / steps:.2g}."
        )
    start = steps - left
    return Schedule(schedule.timesteps[start:], schedule.alphas[start:], schedule.prediction_type)


def add_noise(data: Tensor, noise: Tensor, schedule: Schedule, index: int = 0) -> Tensor:
    """Data with as much noise as step `index` of a schedule starts from; its length: what the last leaves."""
    alpha = schedule.alphas[index].to(noise)
    return alpha.sqrt() * data + (1 - alpha).sqrt() * noise


def noise_level(timestep: int, config: Mapping[str, Any] | None = None) -> float:
    """Where a timestep stands between data (0) and noise (1): its share of the training timesteps.

    The unit of a LoRA's window; a flow model's is sigma, which is its timestep / 1000 as well.
    """
    return timestep / (config or {}).get("num_train_timesteps", SD15["num_train_timesteps"])


def level_of_noise(amount: float, config: Mapping[str, Any] | None = None) -> float:
    """The noise level of the timestep at which noise weighs most nearly sqrt(1 - alpha) = `amount` in x_t."""
    weights = (1.0 - alphas_cumprod(config)).sqrt()
    return noise_level(int((weights - amount).abs().argmin()), config)


def _predict(x, prediction, alpha, alpha_next, eta, prediction_type) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, std, x0) in the working precision."""
    if prediction.shape != x.shape:
        raise ValueError(f"the prediction has shape {tuple(prediction.shape)} but x has {tuple(x.shape)}.")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta}: give 0 (DDIM, no noise) to 1 (DDPM).")
    dtype = work_dtype(x, prediction)
    x, prediction = x.to(dtype), prediction.to(dtype)
    alpha, alpha_next = per_sample(alpha, x, "alpha"), per_sample(alpha_next, x, "alpha_next")
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    if prediction_type == "epsilon":
        x0, epsilon = (x - noise * prediction) / signal, prediction
    elif prediction_type == "v_prediction":
        x0, epsilon = signal * x - noise * prediction, signal * prediction + noise * x
    elif prediction_type == "sample":
        x0, epsilon = prediction, (x - signal * prediction) / noise
    else:
        raise ValueError(f"prediction_type is {prediction_type!r}: choose epsilon, v_prediction or sample.")
    variance = (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
    std = eta * variance.clamp(min=0).sqrt()
    mean = alpha_next.sqrt() * x0 + (1 - alpha_next - std**2).clamp(min=0).sqrt() * epsilon
    return mean, std, x0


def step(
    x: Tensor,
    prediction: Tensor,
    alpha: float | Tensor,
    alpha_next: float | Tensor,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
    generator: Generators = None,
    prediction_type: str = "epsilon",
    storage_dtype: torch.dtype | None = None,
) -> Step:
    """One DDIM step between two cumulative alphas: x_next = mean + std * noise.

    x, prediction: [B,...], any float dtype, computed in float32 (noise too, which DDPO draws in the model's
    dtype). alpha, alpha_next: one value or one per sample. eta: 0 is DDIM, 1 DDPM. Clipping of x0 is left
    out: no latent model uses it. Else as `flow_match.step`.
    """
    mean, std, x0 = _predict(x, prediction, alpha, alpha_next, eta, prediction_type)
    x_next = mean
    if eta > 0:
        noise = draw_noise(x, generator) if noise is None else noise
        x_next = mean + std * noise.to(mean)
    x_next = x_next.to(storage_dtype or x.dtype).to(x.dtype)
    return Step(x_next, mean, std, x0, mean_log_prob(x_next.detach().to(mean.dtype), mean, std))


def log_prob(
    x: Tensor,
    x_next: Tensor,
    prediction: Tensor,
    alpha: float | Tensor,
    alpha_next: float | Tensor,
    *,
    eta: float,
    prediction_type: str = "epsilon",
) -> Tensor:
    """Gaussian log-probability [B] of x -> x_next (mean over elements), differentiable in the prediction.

    0 where the step is deterministic (eta 0, or alpha_next 1).
    """
    mean, std, _ = _predict(x, prediction, alpha, alpha_next, eta, prediction_type)
    return mean_log_prob(x_next.to(mean.dtype), mean, std)


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    schedule: Schedule,
    *,
    eta: float = 0.0,
    window: Window = None,
    generator: Generators = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    record: bool = False,
    storage_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, list[Transition]]:
    """Run a schedule from `noise` [B,...]; returns the latents, or (latents, transitions) with `record`.

    predict(x, t): the model; x in noise's dtype, t a 0-dim int64 tensor. The last step is always
    deterministic: its noise would stay in the image, and its tiny variance would drown every other
    log-probability. Window, generator, callback (dict with i, t, x, denoised, prediction), record and
    storage_dtype as in `flow_match.sample`.
    """
    steps = len(schedule)
    random = {i for i in window_steps(window, steps) if eta > 0 and i < steps - 1}
    stored = storage_dtype or noise.dtype
    alphas = schedule.alphas.tolist()
    x = noise.to(work_dtype(noise))
    transitions: list[Transition] = []
    for i in range(steps):
        keep = record and i in random
        if keep:
            x = x.to(stored).to(x.dtype)
        t = schedule.timesteps[i]
        prediction = predict(x.to(noise.dtype), t.to(x.device))
        result = step(
            x,
            prediction,
            alphas[i],
            alphas[i + 1],
            eta=eta if i in random else 0.0,
            generator=generator,
            prediction_type=schedule.prediction_type,
            storage_dtype=stored if keep else None,
        )
        if callback is not None:
            callback({"i": i, "t": t, "x": x, "denoised": result.x0, "prediction": prediction})
        if keep:
            transitions.append(
                Transition(
                    index=i,
                    time=int(t),
                    x=x.to(stored),
                    x_next=result.x_next.to(stored),
                    mean=result.mean,
                    std=result.std,
                    log_prob=result.log_prob,
                    moments=partial(
                        _predict,
                        alpha=alphas[i],
                        alpha_next=alphas[i + 1],
                        eta=eta,
                        prediction_type=schedule.prediction_type,
                    ),
                )
            )
        x = result.x_next
    x = x.to(noise.dtype)
    return (x, transitions) if record else x
