"""Several rewards together, and group statistics that leave failures out."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import NOTHING, Context, Reward


def group_normalise(scores: Tensor, groups: Tensor, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """(score - group mean) / (std + eps); NaN scores stay NaN and do not enter the statistics.

    scores: [N]; groups: [N] integer group of each. scale: whose population std divides: "group", or "global"
    for that of all valid scores together (Flow-GRPO: a group of near-equal scores is not blown up), which
    falls back to the group's when there is one group only. Equal scores, or a single valid one, give 0.
    """
    if scale not in ("group", "global"):
        raise ValueError(f"scale is {scale!r}: choose group or global.")
    valid = scores.isfinite()
    labels = groups.unique()
    out = torch.full_like(scores, torch.nan)
    for label in labels:
        members = (groups == label) & valid
        if not members.any():
            continue
        own = scores[members]
        if own.min() == own.max():  # their mean is rounded: equal scores less it are not always 0
            out[members] = 0.0
            continue
        spread = scores[valid] if scale == "global" and len(labels) > 1 else own
        out[members] = (own - own.mean()) / (spread.std(unbiased=False) + eps)
    return out


def combine(
    raw: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor, scale: str = "group"
) -> Tensor:
    """Normalise each reward within its groups, then weight and sum -> [N].

    Scales differ by orders of magnitude between rewards, so a sum of raw numbers would be the sum of the
    widest one. An image for which some rewards failed is judged by the others, by none: NaN.
    """
    count = len(groups)
    total, used = torch.zeros(count), torch.zeros(count)
    for name, scores in raw.items():
        normal = group_normalise(scores, groups, scale)
        valid = normal.isfinite()
        total += torch.where(valid, weights[name] * normal, 0.0)
        used += valid * abs(weights[name])
    full = sum(abs(weights[name]) for name in raw)
    return torch.where(used > 0, total * full / used.clamp_min(1e-12), torch.nan)


@dataclass(frozen=True)
class CompositeScores:
    """raw: each reward's own numbers [N] by name; combined: [N]; failures: NaN count by name."""

    raw: dict[str, Tensor]
    combined: Tensor
    failures: dict[str, int]


class Composite:
    """Several rewards and their weights (1 each by default), joined by `combine`."""

    def __init__(self, rewards: Sequence[Reward], weights: Mapping[str, float] | None = None):
        self.rewards = list(rewards)
        self.weights = {reward.name: 1.0 for reward in self.rewards} | dict(weights or {})
        unknown = set(self.weights) - {reward.name for reward in self.rewards}
        if not self.rewards or unknown:
            raise ValueError(
                f"weights name rewards that are not used: {sorted(unknown)}; give at least one reward."
            )

    def weighted_sum(self, raw: Mapping[str, float]) -> float:
        """The weighted sum of raw scores by reward, without those that judged nothing (NaN); NaN if none did.

        For comparing images of one run with one another (see `better`): between rewards it does not balance
        scales, see `combine`.
        """
        judged = [self.weights[name] * score for name, score in raw.items() if math.isfinite(score)]
        return sum(judged) if judged else math.nan

    def better(self, raw: Mapping[str, float], other: Mapping[str, float]) -> bool:
        """Whether scores sum up to as much as others or more, by the rewards that judged both.

        Scores that no reward could give are never better; those that some could are better than none.
        """
        judged, known = ({n for n, value in each.items() if math.isfinite(value)} for each in (raw, other))
        common = judged & known
        if not common:
            return bool(judged) and not known
        own, theirs = (self.weighted_sum({n: each[n] for n in common}) for each in (raw, other))
        return own >= theirs

    def missing(self, given: Collection[str]) -> str:
        """What some reward still needs beside the images and what is given, in words; "" if nothing."""
        wants = {reward.name: reward.missing(given) for reward in self.rewards}
        return "; ".join(f"{name} needs {what}" for name, what in wants.items() if what)

    def score(
        self,
        images: Tensor,
        context: Context = NOTHING,
        groups: Tensor | None = None,
    ) -> CompositeScores:
        """As `Reward.score`; groups [N] integers tell which images compete (default: all with all)."""
        raw = {reward.name: reward.score(images, context) for reward in self.rewards}
        groups = torch.zeros(len(images), dtype=torch.long) if groups is None else groups.cpu()
        combined = combine(raw, self.weights, groups)
        return CompositeScores(raw, combined, {name: int(s.isnan().sum()) for name, s in raw.items()})
