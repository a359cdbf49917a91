"""The shapes checker as a reward: exact judgement of an edit in the shapes world."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..tiny.shapes import Scene, check_many, read
from ..tiny.shapes.words import understand
from .base import Context, Reward, register


@register("shapes")
class ShapesEdit(Reward):
    """Mean of the share of the target scene that the checker finds and of full success (0 or 1).

    The target scene is read off the target image, or where there is none it follows from the source and
    the instruction (NaN for words that are not of the shapes world). The smooth part tells a near miss from a
    failure, so that a group in which nobody succeeded still teaches.
    """

    name, range = "shapes", (0.0, 1.0)

    def missing(self, given: Collection[str]) -> str:
        """As of `Reward`: the target image, or source and instruction."""
        either = "targets" in given or {"prompts", "sources"} <= set(given)
        return "" if either else "targets, or sources and prompts"

    def _score(self, images: Tensor, context: Context) -> Tensor:
        if context.targets is None:
            scenes = _understood(context.sources, context.prompts)
        else:
            seen = read(context.targets.float().cpu())
            scenes = [seen.scene(row) for row in range(len(images))]
        known = [row for row, scene in enumerate(scenes) if scene is not None]
        scores = torch.full((len(images),), torch.nan)
        if known:
            reports = check_many(images[known].float().cpu(), [scenes[row] for row in known])
            scores[known] = torch.tensor([(r.score + float(r.score >= 1.0)) / 2 for r in reports])
        return scores


def _understood(sources: Tensor, prompts: Sequence[str]) -> list[Scene | None]:
    """The scene each instruction asks for, None where it is not understood."""
    seen = read(sources.float().cpu())
    edits = [understand(seen.scene(row), prompt) for row, prompt in enumerate(prompts)]
    return [None if edit is None else edit.target for edit in edits]
