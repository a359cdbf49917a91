"""The shapes checker as a reward: exact judgement of an edit in the shapes world."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Reward


class ShapesEdit(Reward):
    """Mean of the share of the wanted scene that the checker finds and of full success (0 or 1).

    The smooth part tells a near miss from a failure, so that a group in which nobody succeeded still teaches.
    """

    name, range = "shapes", (0.0, 1.0)

    def __init__(self, scenes: Sequence | None = None):
        self.scenes = scenes

    def score(self, images, prompts=None, sources=None, masks=None, scenes: Sequence | None = None) -> Tensor:
        """As `Reward.score`, with the wanted Scene of each image."""
        scenes = scenes if scenes is not None else self.scenes
        if scenes is None or len(scenes) != len(images):
            raise ValueError("reward shapes needs the wanted scene of each image: train on the shapes world.")
        from ..shapes import check_many

        reports = check_many(images.float().cpu(), list(scenes))
        return torch.tensor([(report.score + float(report.score >= 1.0)) / 2 for report in reports])
