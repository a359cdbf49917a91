"""Does a LoRA fit this model? Decided for all modules before anything is touched; shared by both appliers."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch
import torch.nn.functional as F

from .errors import LoraError
from .rotations import InputOft
from .weights import Factored, LoraInfo, LoraWeights, LowRank, Module, MoeLowRank

NO_SUCH_LAYER = "this model has no such layer"
_EMBEDDER = "x_embedder"
_NOISE = 64  # the noise latents are the first inputs of every FLUX, conditions follow
_FAMILY = {64: "FLUX dev or Kontext", 128: "FLUX control", 384: "FLUX Fill"}
_VAE = ("encoder.down", "decoder.up", "first_stage_model.", "decoder.mid")


def check_applicable(weights: LoraWeights, strength: float = 1.0) -> None:
    """Raises LoraError for a whole checkpoint, which is a model and not a change to one."""
    if not math.isfinite(strength):
        raise LoraError(f"the strength of {weights.name} is {strength}: it must be a finite number")
    if not weights.is_checkpoint:
        return
    if any(name.startswith(_VAE) for name in weights.full):
        raise LoraError(f"{weights.name} is a VAE, not a LoRA: load it with Load VAE, and choose a LoRA here")
    raise LoraError(
        f"{weights.name} is a full fine-tuned model ({len(weights.full)} tensors), not a LoRA: load it with "
        "Load Diffusion Model, and choose a LoRA here"
    )


def fit_module(
    path: str,
    module: Module,
    out: int,
    width: int,
    notes: list[str],
    *,
    kernel: tuple[int, ...] = (),
    may_grow: bool = False,
) -> Module:
    """The module as this model's layer [out, width, *kernel] takes it. Raises LoraError naming the mismatch.

    x_embedder of 64 inputs (a FLUX dev or Kontext LoRA) gets zero columns where the model has more: the noise
    latents are the first 64 inputs of every FLUX, what follows are conditions this LoRA never saw. may_grow:
    allow the x_embedder of a BFL control LoRA, whose 128 inputs the host makes room for.
    """
    rows, columns = module.shape[0], module.columns
    here = width * torch.Size(kernel).numel()
    if isinstance(module, MoeLowRank) and kernel:
        raise LoraError(
            f"the LoRA's {path} has experts, which a convolution cannot have: load another base model"
        )
    shared = isinstance(module, InputOft) and module.shared and here % module.size
    if rows in (None, out) and columns in (None, here) and not shared:
        return module
    if path == _EMBEDDER and rows == out and columns is not None:
        if columns == _NOISE < width and (widened := _widened(module, width)) is not None:
            notes.append(
                f"x_embedder has {columns} inputs, the model {width}: padded with zero columns, not dropped"
            )
            return widened
        if may_grow and (columns, width) == (128, 64) and isinstance(module, LowRank):
            notes.append(f"x_embedder grows from {width} to {columns} inputs")
            return module
        wanted = _FAMILY.get(columns, f"a model with {columns} inputs")
        live = _FAMILY.get(width, f"a model with {width} inputs")
        raise LoraError(
            f"this LoRA is for {wanted} (x_embedder {columns} inputs), the model is {live} ({width}): "
            f"load {wanted}"
        )
    sizes = " -> ".join("any" if n is None else str(n) for n in (columns, rows))
    raise LoraError(
        f"the LoRA's {path} is {sizes}, the model's is {here} -> {out}: "
        "it was trained on another base model, load that one"
    )


def _widened(module: Module, width: int) -> Module | None:
    if isinstance(module, LowRank) and module.A.ndim == 2:
        return replace(module, A=F.pad(module.A, (0, width - module.A.shape[1])))
    if isinstance(module, Factored) and len(module.whole_shape) == 2:
        return replace(module, width=width)
    return None


def base_notes(info: LoraInfo, inputs: int | None) -> list[str]:
    """A sentence where the header names another FLUX than this one; inputs: of the model's x_embedder."""
    words = set(re.split(r"[^a-z0-9]+", (info.stated_base or "").lower()))
    trained = {"kontext", "fill", "control", "canny", "depth"} & words
    if inputs not in _FAMILY or len(trained) != 1:
        return []
    (kind,) = trained
    wanted = {"kontext": 64, "fill": 384}.get(kind, 128)
    if inputs == wanted:
        return []
    return [
        f"its header names {info.stated_base} as the model it was trained on, this one is {_FAMILY[inputs]}: "
        f"expect little or odd effect, load FLUX.1 {kind.title()} for it"
    ]


def refuse_if_nothing_fits(weights: LoraWeights, loaded: int, model: str) -> None:
    """Raises LoraError when not one module of the LoRA exists in the model."""
    if loaded == 0:
        first = next(iter([*weights.modules, *weights.full]), "")
        raise LoraError(
            f"{weights.name} is for {weights.info.base} ({first}, ...), and {model} has none of its layers: "
            "load the base model it was trained on"
        )
