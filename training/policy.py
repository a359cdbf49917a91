"""The policy-gradient objective on recorded transitions: advantages, clipped ratio, RatioNorm, velocity KL.

Pure functions on tensors; the loop that calls them is `grpo.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..samplers.gaussian import kl
from .rewards.composite import combine


@dataclass(frozen=True)
class Advantages:
    """values [N], NaN replaced by 0; keep [N] bool, False for failures and groups that teach nothing."""

    values: Tensor
    keep: Tensor


def advantages(
    raw: Mapping[str, Tensor],
    groups: Tensor,
    weights: Mapping[str, float],
    *,
    scale: str = "global",
    clamp: float = 5.0,
) -> Advantages:
    """Group-relative advantages: normalised per reward, weighted, summed, clamped.

    raw: scores [N] by reward; groups: [N]. A group whose advantages are all zero (every sample equally good)
    is filtered: it has no gradient but would dilute the mean. Source: Flow-GRPO's per-prompt statistics with
    the epoch's std; DanceGRPO's clamp of 5.
    """
    values = combine(raw, weights, groups, scale)
    keep = values.isfinite()
    values = torch.where(keep, values.clamp(-clamp, clamp), 0.0)
    for label in groups.unique():
        members = groups == label
        if (values[members].abs() < 1e-8).all():
            keep = keep & ~members
    return Advantages(values, keep)


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


def ratio_norm(log_ratio: Tensor, mean: Tensor, mean_old: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's correction: (log r + mean (mu - mu_old)^2 / (2 std^2)) * std, [B].

    Without it E[log r] = -(mu - mu_old)^2 / (2 std^2) < 0, worst at low noise, so that the upper clip hardly
    ever fires. Source: Pref-GRPO, `train_flux1_kontext_edit.py`.
    """
    scale = std.expand(len(mean), *std.shape[1:]).flatten(1).mean(1) if std.ndim else std
    return (log_ratio + kl(mean, mean_old, std)) * scale
