"""LoRA files of every format: read, apply to diffusers or ComfyUI, save.

`read(path) -> LoraWeights`, then `apply_to_diffusers(module, weights)` or `apply_to_comfy(model, weights)`.
"""

from __future__ import annotations

from .delta import in_window
from .diffusers import apply_to_diffusers, from_peft
from .extract import extract
from .read import read
from .save import save
from .weights import (
    Based,
    Factored,
    FullTensor,
    LoraError,
    LoraInfo,
    LoraWeights,
    LowRank,
    MoeLowRank,
    Report,
)


def apply_to_comfy(model, weights: LoraWeights, strength: float = 1.0, **options):
    """Puts a LoRA onto a clone of a ComfyUI MODEL; see `comfy.apply_to_comfy`. Needs ComfyUI running."""
    from .comfy import apply_to_comfy as apply

    return apply(model, weights, strength, **options)


__all__ = [
    "Based",
    "Factored",
    "FullTensor",
    "LoraError",
    "LoraInfo",
    "LoraWeights",
    "LowRank",
    "MoeLowRank",
    "Report",
    "apply_to_comfy",
    "apply_to_diffusers",
    "extract",
    "from_peft",
    "in_window",
    "read",
    "save",
]
