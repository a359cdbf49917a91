"""Optimisers, learning-rate schedule and the moving average of the trained weights."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ... import missing

REMEDIES = {
    "prodigy": ("prodigyopt", "set optimizer: adamw and lr: 1e-4"),
    "adamw8bit": ("bitsandbytes", "set optimizer: adamw"),
}


def check(config) -> None:
    """Raises ValueError, before anything expensive, if the optimiser's package is missing."""
    package, remedy = REMEDIES.get(config.optimizer, (None, ""))
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"optimizer is {config.optimizer} but {missing.lacking(package)}, or {remedy}")


def make_optimizer(parameters: Iterable[nn.Parameter], config) -> torch.optim.Optimizer:
    """AdamW, 8-bit AdamW or Prodigy. Raises ValueError if there is nothing to train."""
    check(config)
    parameters = list(parameters)
    if not parameters:
        raise ValueError("nothing is trained: check method and target_modules")
    betas, decay = (0.9, config.adam_beta2), config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, betas=betas, weight_decay=decay)
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            parameters,
            lr=config.lr,
            betas=betas,
            weight_decay=decay,
            use_bias_correction=True,
            safeguard_warmup=True,
        )
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=config.lr, betas=betas, weight_decay=decay)


def lr_factor(step: int, config) -> float:
    """Factor on the learning rate at optimiser step `step` (0-based): linear warm-up, then the schedule.

    A function of the step, so a resumed run needs no scheduler's state; diffusers' `get_scheduler` keeps one,
    and its warm-up begins at 0, which wastes the first step.
    """
    if step < config.lr_warmup:
        return (step + 1) / config.lr_warmup
    if config.lr_schedule == "constant":
        return 1.0
    along = (step - config.lr_warmup) / max(1, config.max_steps - config.lr_warmup)
    along = min(1.0, along)
    return 0.5 * (1 + math.cos(math.pi * along)) if config.lr_schedule == "cosine" else 1.0 - along


def set_lr(optimizer: torch.optim.Optimizer, step: int, config) -> float:
    """Set the rate of every group for this step; returns it."""
    rate = config.lr * lr_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


class MovingAverage:
    """Exponential moving average in float32: decay min(d, (1 + n) / (10 + n)) after n updates.

    values: by parameter name, as checkpoints keep them. diffusers' `EMAModel` keeps a list in the parameters'
    own type, and forgets its first values at the first update.
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float):
        self.decay = decay
        self.restart(parameters)

    def restart(self, parameters: dict[str, Tensor]) -> None:
        """Begin at these values."""
        self.updates = 0
        self.values = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, Tensor]) -> None:
        """Take one step towards these values."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        names = list(self.values)
        torch._foreach_lerp_(
            [self.values[n] for n in names], [parameters[n].detach().float() for n in names], 1 - decay
        )

    @torch.no_grad()
    def swap(self, parameters: dict[str, Tensor]) -> None:
        """Exchange the averages with the parameters; call again to undo."""
        for name, value in self.values.items():
            kept = parameters[name].detach().float().clone()
            parameters[name].copy_(value)
            value.copy_(kept)
