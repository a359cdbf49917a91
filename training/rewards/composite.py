"""Several rewards together, and group statistics that leave failures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Reward


def group_normalise(scores: Tensor, groups: Tensor, eps: float = 1e-4) -> Tensor:
    """(score - group mean) / (group std + eps); NaN scores stay NaN and do not enter the statistics.

    scores: [N]; groups: [N] integer group of each. std is the population one, so a group of equal scores, or
    with a single valid one, gives 0.
    """
    out = torch.full_like(scores, torch.nan)
    for group in groups.unique():
        members = (groups == group) & scores.isfinite()
        if members.any():
            valid = scores[members]
            out[members] = (valid - valid.mean()) / (valid.std(unbiased=False) + eps)
    return out


@dataclass(frozen=True)
class CompositeScores:
    """raw: each reward's own numbers [N] by name; combined: [N]; failures: NaN count by name."""

    raw: dict[str, Tensor]
    combined: Tensor
    failures: dict[str, int]


class Composite:
    """Rewards normalised within the group, then weighted and summed.

    Scales differ by orders of magnitude between rewards, so a sum of raw numbers would be the sum of the
    widest one. A picture for which some rewards failed is judged by the others; by none: NaN.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Mapping[str, float] | None = None):
        self.rewards = list(rewards)
        self.weights = {reward.name: 1.0 for reward in self.rewards} | dict(weights or {})
        unknown = set(self.weights) - {reward.name for reward in self.rewards}
        if not self.rewards or unknown:
            raise ValueError(
                f"weights name rewards that are not used: {sorted(unknown)}; give at least one reward."
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(reward.needs for reward in self.rewards))

    def score(
        self,
        images: Tensor,
        prompts: Sequence[str] | None,
        sources: Tensor | None = None,
        masks: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> CompositeScores:
        """As `Reward.score`; groups [N] tells which pictures compete (default: all with all)."""
        raw = {reward.name: reward.score(images, prompts, sources, masks) for reward in self.rewards}
        groups = torch.zeros(len(images), dtype=torch.long) if groups is None else groups.cpu()
        total, weight = torch.zeros(len(images)), torch.zeros(len(images))
        for name, scores in raw.items():
            normal = group_normalise(scores, groups)
            valid = normal.isfinite()
            total += torch.where(valid, self.weights[name] * normal, 0.0)
            weight += valid * abs(self.weights[name])
        full = sum(abs(value) for value in self.weights.values())
        combined = torch.where(weight > 0, total * full / weight.clamp_min(1e-12), torch.nan)
        return CompositeScores(raw, combined, {name: int(s.isnan().sum()) for name, s in raw.items()})
