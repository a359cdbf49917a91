"""The policy-gradient objective on recorded transitions: group-relative advantages and the clipped ratio.

Pure functions on tensors; the loop that calls them is `grpo.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rewards.composite import combine

# Largest advantage: DanceGRPO's clamp. DiffusionNFT divides by it and multiplies its loss by it (`nft.py`),
# so it sets the scale of that objective too, and every measured figure rests on it.
ADVANTAGE_MAX = 5.0


@dataclass(frozen=True)
class Advantages:
    """values [N], NaN replaced by 0; keep [N] bool, False for failures and groups that teach nothing."""

    values: Tensor
    keep: Tensor


def advantages(
    raw: Mapping[str, Tensor], groups: Tensor, weights: Mapping[str, float], *, scale: str = "global"
) -> Advantages:
    """Group-relative advantages [N]: normalised per reward, weighted, summed, clamped to `ADVANTAGE_MAX`.

    raw: scores [N] by reward; groups: [N]. A group in which no reward tells two samples apart, by the raw
    scores, is filtered: it has no gradient but would dilute the mean. So is one whose rewards cancel.
    Source: Flow-GRPO's per-prompt statistics with the epoch's std; DanceGRPO's clamp.
    """
    values = combine(raw, weights, groups, scale)
    keep = values.isfinite()
    values = torch.where(keep, values.clamp(-ADVANTAGE_MAX, ADVANTAGE_MAX), 0.0)
    for label in groups.unique():
        members = groups == label
        if values[members].abs().max() < 1e-8 or not any(_differ(scores[members]) for scores in raw.values()):
            keep = keep & ~members
    return Advantages(torch.where(keep, values, 0.0), keep)


def _differ(scores: Tensor) -> bool:
    """Whether the judged ones of these scores [n] are not all equal."""
    known = scores[scores.isfinite()]
    return len(known) > 1 and bool(known.min() < known.max())


@dataclass(frozen=True)
class PolicyLoss:
    """loss [B] with gradient; ratio [B] and clipped [B] (bool), detached, for the log."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_loss(log_ratio: Tensor, advantage: Tensor, clip: float) -> PolicyLoss:
    """PPO's clipped objective per sample: -min(r A, clip(r, 1-c, 1+c) A), r = exp(log_ratio) [B].

    log_ratio is a mean over latent elements, not a sum, so useful clip ranges are 1e-5 to 1e-3.
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    clipped = (ratio.detach() - 1).abs() > clip
    return PolicyLoss(-gain, ratio.detach(), clipped)
