"""The gradient of one reward update: the sum over its micro-batches, or over groups of limited norm each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..runtime.attention import for_learning
from ..runtime.processes import Processes
from .config import GRPOConfig
from .objectives import Objective
from .rollout import Rollout, kept_only

Log = dict[str, list[Tensor]]


class Piece(NamedTuple):
    """One backward pass: a term of a micro-batch."""

    rollout: Rollout
    term: int


class Gradients:
    """Takes an objective's gradient over the rollouts of all processes, onto what is in `grad` already."""

    def __init__(
        self,
        objective: Objective,
        processes: Processes,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        config: GRPOConfig,
    ):
        """module: the trained model as accelerate wrapped it; parameters: what is trained of it."""
        self.objective, self.module, self.parameters = objective, module, parameters
        self.accelerator, self.world, self.config = processes.accelerator, processes.world, config

    def add(self, rollouts: Sequence[Rollout], kept: int, updates: int = 1) -> tuple[Tensor, Log]:
        """The gradient of the mean loss over all kept samples of all processes, of which there are `kept`.

        rollouts: this process's scored micro-batches of one of `updates` updates that share the samples.
        Samples that teach nothing are not even computed, where the objective allows it. Returns (this
        process's share of the loss, [n] measures of its kept samples by name).
        """
        c, world = self.config, self.world
        if not self.objective.replays:
            rollouts = kept_only(rollouts, c.micro_batch, c.group_size if c.group_clip else 0)
        scale = world * updates / max(1, kept)  # DDP averages over processes
        pieces = [
            Piece(rollout, term)
            for rollout in rollouts
            if rollout.keep.any() or rollout is rollouts[-1]  # every process must reach the synchronising one
            for term in range(self.objective.terms(rollout))
        ]
        log: Log = {}
        total = (self._limited if c.group_clip else self._summed)(pieces, scale, log)
        return total / world, log

    def _summed(self, pieces: Sequence[Piece], scale: float, log: Log) -> Tensor:
        """`scale` times the sum over kept samples; the last pass averages over processes, as DDP does it."""
        total = torch.zeros((), device=self.accelerator.device)
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                total += self._backward(piece, scale, log)
        return total

    def _limited(self, pieces: Sequence[Piece], scale: float, log: Log) -> Tensor:
        """As `_summed`, but no group's gradient (of the mean over its samples) has a norm above `group_clip`.

        Some rows stand at the edge between two outcomes and have gradients a hundred times the usual; in a
        plain sum these few decide. Logs the norms as `group_norm`. Gradients that are there already are not
        limited.
        """
        c, scaler, parameters = self.config, self.accelerator.scaler, self.parameters
        limit = c.group_clip * (scaler.get_scale() if scaler else 1.0)
        sums = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        total = torch.zeros((), device=self.accelerator.device)
        for _, members in groupby(pieces, key=lambda piece: piece.rollout.members[0] // c.group_size):
            group = list(members)
            kept = sum(int(piece.rollout.keep.sum()) for piece in group if piece.term == 0)
            with self.accelerator.no_sync(self.module):
                for piece in group:
                    total += self._backward(piece, 1 / max(1, kept), log) * kept * scale
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
            if kept:
                log.setdefault("group_norm", []).append(norm.detach().reshape(1) * c.group_clip / limit)
            for parameter, gradient in zip(parameters, sums, strict=True):
                if parameter.grad is not None:  # a text encoder's: rollouts hold their text as it was
                    gradient.add_(parameter.grad, alpha=kept * scale)
                    parameter.grad = None
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = self.accelerator.reduce(gradient, "mean")
        return total

    def _backward(self, piece: Piece, scale: float, log: Log) -> Tensor:
        """Add the gradient of `scale` times a term's loss, summed over kept samples; returns that loss."""
        rollout, objective = piece.rollout, self.objective
        with nullcontext() if objective.replays else for_learning(rollout.latents):
            rows, measures = objective.loss(rollout, piece.term)
            loss = (rows * rollout.keep).sum() / objective.terms(rollout) * scale
            self.accelerator.backward(loss)
        for name, value in measures.items():
            log.setdefault(name, []).append(value.detach()[rollout.keep])
        return loss.detach()
