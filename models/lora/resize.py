"""A LoRA of a smaller rank: each module's leading singular directions, the nearest change of that rank."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .extract import balanced
from .weights import LoraError, LoraWeights, LowRank


def cut(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [r,in] and [out,r] of the best approximation of up @ down with r at most `rank`."""
    if len(down) <= rank:
        return down, up
    left, inner = torch.linalg.qr(up)
    right, outer = torch.linalg.qr(down.T)
    down, up = balanced(*torch.linalg.svd(inner @ outer.T), rank)
    return down @ right.T, left @ up


def resize(weights: LoraWeights, rank: int) -> LoraWeights:
    """The LoRA with no module above `rank`; smaller ones stay as they are, in the type they have.

    The scale goes into the factors. notes say how much of the squared change is kept. Raises LoraError for
    what has no two factors to cut (MoE experts, LyCORIS factors, whole tensors).
    """
    if rank < 1:
        raise LoraError(f"rank is {rank}: it must be 1 or more")
    odd = [name for name, module in weights.modules.items() if not isinstance(module, LowRank)]
    odd += list(weights.full)
    if odd:
        raise LoraError(
            f"{weights.name}: {odd[0]} is no plain pair of LoRA factors: only plain LoRAs can be resized"
        )
    modules, kept, total = {}, 0.0, 0.0
    for name, module in weights.modules.items():
        whole = module.A.float().flatten(1), module.scale * module.B.float().flatten(1)
        down, up = cut(*whole, rank)
        total, kept = total + _energy(*whole), kept + _energy(down, up)
        if module.rank > rank:
            module = LowRank(
                down.reshape(rank, *module.A.shape[1:]).to(module.A.dtype),
                up.reshape(len(up), rank, *module.B.shape[2:]).to(module.B.dtype),
                1.0,
                "resized",
            )
        modules[name] = module
    note = f"resized to rank {rank}: {kept / total if total else 1:.1%} of the squared change kept"
    info = replace(weights.info, rank=rank, alpha=float(rank), alpha_from="resized")
    return replace(weights, modules=modules, info=info, notes=(*weights.notes, note))


def _energy(down: Tensor, up: Tensor) -> float:
    """The squares of up @ down, summed without making it."""
    return float(((up.T @ up) * (down @ down.T)).sum())
