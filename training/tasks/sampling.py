"""How a batch is sampled in training: the settings of a rollout, and the LoRA switched by noise level.

The loops themselves are those of `samplers/`; each family calls the one that fits its prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models.lora.delta import in_window
from ..data.dataset import latents_like
from ..runtime.random_streams import row_noise
from .adapters import switched_off


@dataclass(frozen=True)
class RolloutSettings:
    """How latents are sampled from a batch; unlike `models.editing.Sampling`, which turns an image into an
    edited image, it has no seed, encoder or judge, and what is recorded can be stored in another dtype.

    window: the random steps (start, end), half-open; None is the plain ODE, for which rule and eta say
    nothing. eta None is the rule's own default. lora_window: (start, end] in noise levels outside of which
    the LoRA is off.
    """

    steps: int
    guidance: float
    rule: str = "flow"
    eta: float | None = None
    window: tuple[int, int] | None = None
    storage_dtype: torch.dtype = torch.float32
    lora_window: tuple[float, float] | None = None


def noise_for(batch: dict[str, Any], seed: int, positions: Sequence[int]) -> Tensor:
    """Noise [B,C,h,w] for a batch's latents, on its device; row n's is that of positions[n] in the stream."""
    like = latents_like(batch)
    return row_noise(seed, list(positions), tuple(like.shape[1:])).to(like.device)


@contextmanager
def lora_at(module: nn.Module, level: float, window: tuple[float, float] | None) -> Iterator[None]:
    """The module as loaders run its LoRA at this noise level in 0..1: without it outside the window."""
    with nullcontext() if in_window(level, window) else switched_off(module):
        yield
