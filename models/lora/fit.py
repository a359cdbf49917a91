"""Does a LoRA fit this model? Decided for all modules before anything is touched; shared by both appliers."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F

from .weights import Factored, LoraError, LoraWeights, LowRank, Module

NO_SUCH_LAYER = "this model has no such layer"
_EMBEDDER = "x_embedder"
_FAMILY = {64: "FLUX dev or Kontext", 128: "FLUX control", 384: "FLUX Fill"}


def check_applicable(weights: LoraWeights) -> None:
    """Raises LoraError for a whole checkpoint, which is a model and not a change to one."""
    if weights.is_checkpoint:
        raise LoraError(
            f"{weights.name} is a full fine-tuned model ({len(weights.full)} tensors), not a LoRA: load it "
            "as the model (Load Diffusion Model), or extract a LoRA with `extract(base, weights, rank)`"
        )


def fit_module(
    path: str, module: Module, out: int, width: int, notes: list[str], *, may_grow: bool = False
) -> Module:
    """The module as this model's layer [out, width] takes it. Raises LoraError naming the mismatch.

    x_embedder of fewer inputs than the model's (a FLUX dev LoRA on FLUX Fill) gets zero columns: the noise
    latents are the first 64 inputs of every FLUX, what follows are conditions this LoRA never saw.
    may_grow: allow the x_embedder of a BFL control LoRA (128 inputs on a 64-input model); the host enlarges
    the layer.
    """
    rows, columns = module.shape
    if (rows, columns) == (out, width):
        return module
    if path == _EMBEDDER and rows == out and isinstance(module, LowRank) and module.A.ndim == 2:
        if columns < width:
            notes.append(
                f"x_embedder has {columns} inputs, the model {width}: padded with zero columns, not dropped"
            )
            return replace(module, A=F.pad(module.A, (0, width - columns)))
        if may_grow and (columns, width) == (128, 64):
            notes.append(f"x_embedder grows from {width} to {columns} inputs")
            return module
        wanted = _FAMILY.get(columns, f"a model with {columns} inputs")
        here = _FAMILY.get(width, f"a model with {width} inputs")
        raise LoraError(
            f"this LoRA is for {wanted} (x_embedder {columns} inputs), the model is {here} ({width}): "
            f"load {wanted}"
        )
    if columns == width and rows != out and isinstance(module, Factored):
        raise LoraError(f"LoKr/LoHa of {path} gives {rows} outputs, the layer has {out}")
    raise LoraError(
        f"the LoRA's {path} is {columns} -> {rows}, the model's is {width} -> {out}: "
        "it was trained on another base model, load that one"
    )


def refuse_if_nothing_fits(weights: LoraWeights, loaded: int, model: str) -> None:
    """Raises LoraError when not one module of the LoRA exists in the model."""
    if loaded == 0:
        first = next(iter([*weights.modules, *weights.full]), "")
        raise LoraError(
            f"{weights.name} is for {weights.info.base} ({first}, ...), and {model} has none of its layers: "
            "load the base model it was trained on"
        )
