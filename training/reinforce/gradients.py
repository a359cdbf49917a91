"""The gradient of one reward update: the sum over its micro-batches, or over groups of limited norm each.

`trainer` is a `grpo.GRPOTrainer`; what a term's loss is stands there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.attention import for_learning
from .rollout import Rollout


class Piece(NamedTuple):
    """One backward pass: a term (transition or noise level) of a micro-batch. advantage, keep: [B]."""

    rollout: Rollout
    term: int
    advantage: Tensor
    keep: Tensor


Log = dict[str, list[Tensor]]


def summed(trainer: Any, pieces: Sequence[Piece], scale: float) -> tuple[Tensor, Log]:
    """Gradients of `scale` times the sum over kept samples, averaged over processes as DDP does it, and with
    them the gradients that this process has already.

    Returns (this process's share of the loss, measures of the kept samples).
    """
    accelerator, module = trainer.accelerator, trainer.model.prepared[trainer.task.denoiser_part]
    total, log = torch.zeros((), device=accelerator.device), {}
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        with nullcontext() if last else accelerator.no_sync(module):
            total += _backward(trainer, piece, log, scale) / trainer.processes.world
    return total, log


def limited(trainer: Any, pieces: Sequence[Piece], scale: float) -> tuple[Tensor, Log]:
    """As `summed`, but no group's gradient (of the mean over its samples) has a norm above `group_clip`.

    Some rows stand at the edge between two outcomes and have gradients a hundred times the usual; in a plain
    sum these few decide. Logs the norms as `group_norm`. Gradients that are there already are not limited.
    """
    accelerator, module = trainer.accelerator, trainer.model.prepared[trainer.task.denoiser_part]
    c, parameters = trainer.config, list(trainer.model.parameters.values())
    limit = c.group_clip * (accelerator.scaler.get_scale() if accelerator.scaler else 1.0)
    sums = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    total, log = torch.zeros((), device=accelerator.device), {}
    for _, members in groupby(pieces, key=lambda piece: piece.rollout.members[0] // c.group_size):
        group = list(members)
        kept = sum(int(piece.keep.sum()) for piece in group if piece.term == 0)
        with accelerator.no_sync(module):
            for piece in group:
                loss = _backward(trainer, piece, log, 1 / max(1, kept))
                total += loss * kept * scale / trainer.processes.world
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if kept:
            log.setdefault("group_norm", []).append(norm.detach().reshape(1) * c.group_clip / limit)
        for parameter, gradient in zip(parameters, sums, strict=True):
            if parameter.grad is not None:  # a text encoder's: rollouts hold their text as it was
                gradient.add_(parameter.grad, alpha=kept * scale)
                parameter.grad = None
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = accelerator.reduce(gradient, "mean")
    return total, log


def _backward(trainer: Any, piece: Piece, log: Log, scale: float) -> Tensor:
    """Add the gradient of `scale` times a term's loss, summed over its kept samples; returns that loss."""
    # GRPO replays, with the kernels that sampled; DiffusionNFT does not.
    replays = trainer.config.algorithm == "grpo"
    with nullcontext() if replays else for_learning(piece.rollout.latents):
        rows, measures = trainer.objective(piece.rollout, piece.term, piece.advantage)
        loss = (rows * piece.keep).sum() / trainer.terms(piece.rollout) * scale
        trainer.accelerator.backward(loss)
    for name, value in measures.items():
        log.setdefault(name, []).append(value.detach()[piece.keep])
    return loss.detach()
