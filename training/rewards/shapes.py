"""The shapes checker as a reward: exact judgement of an edit in the shapes world."""

from __future__ import annotations

import torch

from .base import Reward, register


@register("shapes")
class ShapesEdit(Reward):
    """Mean of the share of the wanted scene that the checker finds and of full success (0 or 1).

    The wanted scene is read off the target picture. The smooth part tells a near miss from a failure, so that
    a group in which nobody succeeded still teaches.
    """

    name, range, needs = "shapes", (0.0, 1.0), frozenset({"targets"})

    def _score(self, images, prompts, sources, masks, targets):
        from ..shapes import check_many, read

        wanted = read(targets.float().cpu())
        reports = check_many(images.float().cpu(), [wanted.scene(row) for row in range(len(images))])
        return torch.tensor([(report.score + float(report.score >= 1.0)) / 2 for report in reports])
