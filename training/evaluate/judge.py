"""Rewards on images that a person has at hand: one source, mask and instruction beside many images.

For best-of-N while sampling (`Judge`) and for the score node (`rank`). What rewards see of the rows of a
dataset is `reinforce/scoring.py`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models import diptych, pixels
from ...models.diptych import Layout
from ..rewards import CompositeScores, Context, Selection
from .plots import as_image, contact_sheet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judge:
    """Scores images by chosen rewards; `Judge.of` makes one from what is at hand.

    context: of as many rows as there will be images, or of one that serves all; sources, masks and targets
    of any size. layout: the images are diptychs, of which the edit is judged.
    """

    rewards: Selection
    context: Context
    layout: Layout | None = None

    @classmethod
    def of(
        cls,
        rewards: Selection,
        instruction: str = "",
        source: Tensor | None = None,
        mask: Tensor | None = None,
        target: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Judge:
        """A judge that knows the instruction ("" is none), images [B,H,W,C] and mask [B,H,W], 1 = edited.

        A mask of zeros counts as none (`pixels.painted`). With a layout, source and mask default to those it
        was made from. Loads the rewards. Raises ValueError if one cannot be loaded, or lacks something.
        """
        if layout is not None:
            source = layout.source if source is None else source
            mask = layout.edit_mask if mask is None else mask
        drawn = pixels.painted(mask)
        context = Context([instruction] if instruction.strip() else None, source, drawn, target)
        if lacking := rewards.composite.missing(context.given):
            empty = mask is not None and drawn is None
            raise ValueError(
                f"reward {lacking}: connect them (prompts are the instruction"
                f"{'; the mask is empty, which counts as none' if empty else ''}), or choose another reward."
            )
        return cls(rewards, context, layout)

    def scores(self, images: Tensor, groups: Tensor | None = None) -> CompositeScores:
        """Scores of finished images [N,H,W,C]; groups [N] says which of them compete with one another."""
        images = pixels.on_white(pixels.as_image(images)).cpu()
        return self.rewards.composite.score(images, fitted(self.context, images), groups)

    def __call__(self, canvases: Tensor, groups: Tensor | None = None) -> Tensor:
        """Canvases [N,H,W,3] as a sampler paints them -> scores [N] by which to choose, higher is better.

        A canvas that holds NaN or infinity was not painted: its score is NaN.
        """
        painted = canvases.flatten(1).isfinite().all(dim=1)
        if not painted.all():
            scores = torch.full((len(canvases),), torch.nan)
            if painted.any():
                some = None if groups is None else groups[painted.to(groups.device)]
                scores[painted.cpu()] = self(canvases[painted], some)
            return scores
        if self.layout is not None:
            canvases = diptych.split(canvases, self.layout).edited
        scores = self.scores(canvases, groups)
        for name, failed in scores.failures.items():
            if failed:
                logger.warning("reward %s could not judge %d of %d images", name, failed, len(canvases))
        return self.totals(scores)

    def totals(self, scores: CompositeScores) -> Tensor:
        """One number [N] for each image, higher is better; NaN where none of the rewards could judge."""
        if len(self.rewards.specs) > 1:
            return scores.combined
        # One reward's own number says more than its place in the group, and ranks alike.
        (raw,) = scores.raw.values()
        return raw if self.rewards.specs[0].weight > 0 else -raw


def fitted(context: Context, images: Tensor) -> Context:
    """A context, of one row or of N and of any size, at the size of images [N,H,W,3] and N rows long."""
    count, size = len(images), tuple(images.shape[1:3])

    def fit(image: Tensor | None) -> Tensor | None:
        if image is None:
            return None
        image = pixels.on_white(pixels.as_image(image)).cpu()
        return pixels.repeat_batch(pixels.resize_image(image, *size), count)

    mask = context.masks
    if mask is not None:
        mask = pixels.repeat_batch(pixels.binarise(pixels.resize_mask(mask.cpu(), *size)), count)
    prompts = context.prompts
    if prompts is not None and len(prompts) == 1:
        prompts = list(prompts) * count
    return Context(prompts, fit(context.sources), mask, fit(context.targets))


@dataclass(frozen=True)
class Ranking:
    """A judged batch, best first: order [N], scores [N] in that order, IMAGE batch, annotated IMAGE, text."""

    order: list[int]
    scores: list[float]
    images: Tensor
    sheet: Tensor
    text: str


def rank(judge: Judge, images: Tensor, *, side: int = 192, columns: int = 4) -> Ranking:
    """Judge images [N,H,W,C] and sort them; those that could not be judged come last, with NaN.

    A single reward's scores are its own numbers, those of several the weighted sum of standard deviations.
    Raises ValueError if no image could be judged.
    """
    images = pixels.as_image(images)
    scores = judge.scores(images)
    total = judge.totals(scores)
    if total.isnan().all():
        raise ValueError(_nothing_judged(judge, len(images)))
    order = total.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()
    single = len(scores.raw) == 1
    shown = next(iter(scores.raw.values())) if single else total
    lines, rows = [], []
    for place, number in enumerate(order, 1):
        parts = [] if single else [_said("", shown[number], "+.3f")]
        parts += [_said(f"{name} ", values[number]) for name, values in scores.raw.items()]
        lines.append(f"{place}. image {number + 1}: {', '.join(parts)}")
        rows.append(([pixels.rgb(images[number : number + 1])[0]], f"{place}. {' '.join(parts)}"))
    means = [_said(f"{name} ", values.nanmean()) for name, values in scores.raw.items()]
    lines.append(f"mean: {', '.join(means)}")
    lines += [f"{name} could not judge {n} images" for name, n in scores.failures.items() if n]
    sheet = as_image(contact_sheet(rows, side=side, columns=_columns(len(rows), columns)))
    return Ranking(order, [float(shown[i]) for i in order], images[order], sheet, "\n".join(lines))


def _said(what: str, value: Tensor, form: str = ".4g") -> str:
    return f"{what}not judged" if value.isnan() else f"{what}{float(value):{form}}"


def _nothing_judged(judge: Judge, count: int) -> str:
    names = ", ".join(spec.name for spec in judge.rewards.specs)
    why = "see the log for why"
    if judge.context.masks is not None and judge.context.masks.min() >= pixels.MASK_THRESHOLD:
        why = "the mask covers all of the image, so nothing is to be kept: connect the mask of the edit alone"
    return f"{names} could judge none of {count} images: {why}, or choose another reward."


def _columns(count: int, most: int) -> int:
    """Few enough that the last row is not nearly empty."""
    rows = -(-count // most)
    return -(-count // rows)
