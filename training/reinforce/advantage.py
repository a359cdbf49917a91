"""Group-relative advantages: from raw scores to how much better than its group's others a sample is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rewards.composite import combine

# Largest advantage: DanceGRPO's clamp. DiffusionNFT divides by it and multiplies its loss by it
# (`objectives.py`), so it sets the scale of that objective too, and every measured figure rests on it.
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

    raw: scores [N] by reward; groups: [N]. scale: "global" or "group", whose standard deviation divides. A
    group in which no reward tells two samples apart, by the raw scores, is filtered: it has no gradient but
    would dilute the mean. So is one whose rewards cancel.
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
    """Whether the finite ones of these scores [n] are not all equal."""
    known = scores[scores.isfinite()]
    return len(known) > 1 and bool(known.min() < known.max())
