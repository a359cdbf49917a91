"""A low-rank LoRA out of a fully fine-tuned model: the best rank-r change of every weight matrix.

For DanceGRPO and MixGRPO checkpoints of 47 GB that differ from FLUX.1-dev by very little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .weights import LoraError, LoraWeights, LowRank


def extract(
    base: Mapping[str, Tensor],
    tuned: LoraWeights,
    rank: int = 32,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> LoraWeights:
    """The rank-`rank` LoRA that takes `base` closest to `tuned` (truncated SVD of each weight difference).

    base: diffusers parameter path -> tensor (a state dict, or a lazy mapping); tuned: a checkpoint as
    `read` gives it. Matrices that do not differ are left out; vectors (biases, norms) cannot be low-rank and
    are listed as skipped. notes say how much of the squared change the LoRA keeps.
    Raises LoraError when the two do not belong together.
    """
    if not tuned.is_checkpoint:
        raise LoraError(f"{tuned.name} is already a LoRA ({tuned.info.format}): there is nothing to extract")
    modules, skipped = {}, list(tuned.skipped)
    kept = total = 0.0
    names = [n for n in tuned.full if n in base]
    if not names:
        raise LoraError(
            f"{tuned.name} shares no tensor with the base model: give the model it was fine-tuned from"
        )
    skipped.extend((n, "the base model has no such tensor") for n in tuned.full if n not in base)
    for done, name in enumerate(names):
        value, origin = tuned.full[name].value, base[name]
        if value.shape != origin.shape:
            raise LoraError(
                f"{name} is {list(value.shape)} in {tuned.name}, {list(origin.shape)} in the base: "
                "give the model it was fine-tuned from"
            )
        change = value.to(device, torch.float32) - origin.to(device, torch.float32)
        energy = float(change.square().sum())
        if energy > 0 and change.ndim == 2 and name.endswith(".weight"):
            A, B = _truncated(change, rank)
            modules[name.removesuffix(".weight")] = LowRank(A.cpu(), B.cpu(), 1.0, "extracted")
            total += energy
            kept += float((B @ A).square().sum())
        elif energy > 0:
            skipped.append((name, "changed, but not a matrix: a LoRA cannot hold it"))
        if progress is not None:
            progress(done + 1, len(names))
    if not modules:
        raise LoraError(
            f"{tuned.name} is equal to the base model in every matrix: there is nothing to extract"
        )
    note = f"extracted rank {rank} keeps {kept / total:.1%} of the squared change of {len(modules)} matrices"
    info = replace(tuned.info, format="extracted", rank=rank, alpha=float(rank), alpha_from="extracted")
    return LoraWeights(modules, {}, info, tuple(skipped), (note,), tuned.name)


def _truncated(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, in], B [out, r] with B A the best rank-r approximation, `balanced`."""
    rank = min(rank, *change.shape)
    if 4 * rank >= min(change.shape):
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    else:
        # Halko et al. 2011: oversampled randomised SVD, power iterations for the flat spectra seen here
        U, S, V = torch.svd_lowrank(change, q=min(rank + 16, *change.shape), niter=4)
        Vh = V.T
    return balanced(U, S, Vh, rank)


def balanced(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, in], B [out, r] of an SVD's leading `rank` directions, sqrt of the singular values in either."""
    root = S[:rank].clamp_min(0).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root
