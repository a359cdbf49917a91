"""Rewards on pictures that a person has at hand: one source, mask and instruction beside many pictures.

Brings them to the shape `Composite.score` wants, for best-of-N while sampling and for the score node.
Training's rows are arranged by `judging.py`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...models import diptych, pixels
from ...models.diptych import Layout
from ..rewards.chosen import Chosen
from ..rewards.composite import CompositeScores
from .plots import as_image, contact_sheet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beside:
    """What rewards may see beside the pictures; None or "" is not known. A batch of one serves all.

    A mask of zeros counts as none, as everywhere in the pack (`pixels.painted`).
    """

    instruction: str = ""
    source: Tensor | None = None
    mask: Tensor | None = None
    target: Tensor | None = None

    def given(self) -> set[str]:
        present = {
            "prompts": self.instruction.strip(),
            "sources": self.source is not None,
            "masks": pixels.painted(self.mask) is not None,
            "targets": self.target is not None,
        }
        return {name for name, value in present.items() if value}

    def check(self, chosen: Chosen) -> None:
        """Raise ValueError now if a reward needs what is not there (its weights are loaded for that)."""
        if lacking := chosen.composite.missing(self.given()):
            empty = self.mask is not None and "masks" not in self.given()
            raise ValueError(
                f"reward {lacking}: connect them (prompts are the instruction"
                f"{'; the mask is empty, which counts as none' if empty else ''}), or choose another reward."
            )

    def score(self, chosen: Chosen, images: Tensor, groups: Tensor | None = None) -> CompositeScores:
        """Score images [N,H,W,C]; sources and masks are brought to their size."""
        images = pixels.on_white(pixels.as_image(images)).cpu()
        count, size = len(images), tuple(images.shape[1:3])

        def picture(image: Tensor | None) -> Tensor | None:
            if image is None:
                return None
            image = pixels.on_white(pixels.as_image(image)).cpu()
            return pixels.repeat_batch(pixels.resize_image(image, *size), count)

        mask = pixels.painted(self.mask)
        if mask is not None:
            mask = pixels.binarise(pixels.resize_mask(mask.cpu(), *size))
            mask = pixels.repeat_batch(mask, count)
        return chosen.composite.score(
            images,
            [self.instruction] * count if self.instruction.strip() else None,
            picture(self.source),
            mask,
            picture(self.target),
            groups,
        )


@dataclass(frozen=True)
class CanvasJudge:
    """Judges what a sampler paints: the whole picture, or with a layout the edit taken out of the diptych."""

    chosen: Chosen
    beside: Beside = field(default_factory=Beside)
    layout: Layout | None = None

    @classmethod
    def make(cls, chosen: Chosen, beside: Beside, layout: Layout | None = None) -> CanvasJudge:
        """Source and mask default to those that the layout was made from. Raises ValueError if a reward
        lacks something."""
        if layout is not None:
            beside = Beside(
                beside.instruction,
                layout.source if beside.source is None else beside.source,
                layout.edit_mask if beside.mask is None else beside.mask,
                beside.target,
            )
        beside.check(chosen)
        return cls(chosen, beside, layout)

    def __call__(self, canvases: Tensor, groups: Tensor | None = None) -> Tensor:
        """Canvases [N,H,W,3] -> scores [N]; groups [N] says which of them compete with one another.

        A canvas that holds NaN or infinity was not painted: its score is NaN.
        """
        painted = canvases.flatten(1).isfinite().all(dim=1)
        if not painted.all():
            scores = torch.full((len(canvases),), torch.nan)
            if painted.any():
                scores[painted.cpu()] = self(
                    canvases[painted], None if groups is None else groups[painted.cpu()]
                )
            return scores
        if self.layout is not None:
            canvases = diptych.split(canvases, self.layout).edited
        scores = self.beside.score(self.chosen, canvases, groups)
        for name, failed in scores.failures.items():
            if failed:
                logger.warning("reward %s could not judge %d of %d pictures", name, failed, len(canvases))
        # One reward's own number says more than its place in the group, and ranks alike.
        if len(scores.raw) == 1:
            (name,) = scores.raw
            return scores.raw[name] * (1 if self.chosen.entries[0].weight > 0 else -1)
        return scores.combined


@dataclass(frozen=True)
class Ranking:
    """A judged batch, best first: order [N], scores [N] in that order, IMAGE batch, annotated IMAGE, text."""

    order: list[int]
    scores: list[float]
    images: Tensor
    sheet: Tensor
    text: str


def rank(chosen: Chosen, images: Tensor, beside: Beside, *, side: int = 192, columns: int = 4) -> Ranking:
    """Judge a batch and sort it. Pictures that could not be judged come last, with NaN.

    Raises ValueError if none could be.
    """
    beside.check(chosen)
    images = pixels.as_image(images)
    scores = beside.score(chosen, images)
    single = len(scores.raw) == 1
    total = next(iter(scores.raw.values())) if single else scores.combined
    sign = -1 if single and chosen.entries[0].weight < 0 else 1
    if total.isnan().all():
        raise ValueError(_nothing_judged(chosen, len(images), beside))
    ranked = torch.where(total.isnan(), -torch.inf, sign * total)
    order = ranked.argsort(descending=True, stable=True).tolist()
    lines, rows = [], []
    for place, number in enumerate(order, 1):
        parts = [] if single else [_said("", total[number], "+.3f")]
        parts += [_said(f"{name} ", values[number]) for name, values in scores.raw.items()]
        lines.append(f"{place}. picture {number + 1}: {', '.join(parts)}")
        rows.append(([pixels.rgb(images[number : number + 1])[0]], f"{place}. {' '.join(parts)}"))
    means = [_said(f"{name} ", values.nanmean()) for name, values in scores.raw.items()]
    lines.append(f"mean: {', '.join(means)}")
    lines += [f"{name} could not judge {n} pictures" for name, n in scores.failures.items() if n]
    sheet = as_image(contact_sheet(rows, side=side, columns=_columns(len(rows), columns)))
    return Ranking(order, [float(total[i]) for i in order], images[order], sheet, "\n".join(lines))


def _said(what: str, value: Tensor, form: str = ".4g") -> str:
    return f"{what}not judged" if value.isnan() else f"{what}{float(value):{form}}"


def _nothing_judged(chosen: Chosen, count: int, beside: Beside) -> str:
    names = ", ".join(entry.name for entry in chosen.entries)
    why = "see the log for why"
    if beside.mask is not None and pixels.as_mask(beside.mask).min() >= 0.5:
        why = "the mask covers all of the image, so nothing is to be kept: connect the mask of the edit alone"
    return f"{names} could judge none of {count} images: {why}, or choose another reward."


def _columns(count: int, most: int) -> int:
    """Few enough that the last row is not nearly empty."""
    rows = -(-count // most)
    return -(-count // rows)
