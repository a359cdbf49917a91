"""Other weights in place of the trained ones for a while: those before the run, and the old policy's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..tasks.adapters import switched_off
from ..tasks.base import Task
from .config import GRPOConfig

Named = dict[str, Tensor]
OLD_RAMP = 0.001  # growth per update of the old policy's decay, as in the authors' configuration


@contextmanager
def holding(parameters: Named, values: Named) -> Iterator[None]:
    """The parameters have these values, of the same names and shapes, inside the block."""
    places = [parameters[name] for name in values]
    kept = [place.detach().clone() for place in places]
    with torch.no_grad():
        torch._foreach_copy_(places, list(values.values()))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(places, kept)


def copied(parameters: Named) -> Named:
    """Float32 copies that no gradient reaches."""
    return {name: value.detach().float().clone() for name, value in parameters.items()}


class ReferenceModel:
    """The model as it was before the run: without the adapter, or with the LoRA of `init_lora`.

    What a LoRA begins with belongs to where it comes from, not to what it learns here.
    """

    def __init__(self, task: Task, module: nn.Module, parameters: Named, config: GRPOConfig):
        """module: the trained one, with its adapter; parameters: what is trained of it, now as it begins."""
        self.task, self.module, self.parameters = task, module, parameters
        self.guidance = config.rollout_guidance
        self.initial = copied(parameters) if config.init_lora else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """The trained module is the reference model inside the block."""
        if self.initial is None:
            with switched_off(self.module):
                yield
        else:
            with holding(self.parameters, self.initial):
                yield

    def predict(self, x: Tensor, time: float | Tensor, batch: dict[str, Any]) -> Tensor:
        """Its prediction at latents x [B,C,h,w] and time, without gradient.

        To be called before the prediction with gradient: weights may be swapped in place.
        """
        with torch.no_grad(), self.active():
            return self.task.predict(x, time, batch, self.guidance)


class OldPolicy:
    """DiffusionNFT's sampling weights: old <- d old + (1 - d) new, d = min(ramp * update, most)."""

    def __init__(self, parameters: Named, most: float, ramp: float = OLD_RAMP):
        """most: the largest decay, 0..1; ramp: its growth per update."""
        self.parameters, self.ramp, self.most = parameters, ramp, most
        self.values = copied(parameters)

    def active(self) -> AbstractContextManager:
        """The old weights are in the model inside the block."""
        return holding(self.parameters, self.values)

    @torch.no_grad()
    def follow(self, update: int) -> None:
        """Move towards the present weights after `update` updates."""
        decay = min(self.ramp * update, self.most)
        for name, value in self.values.items():
            value.lerp_(self.parameters[name].detach().float(), 1 - decay)
