"""From finished samples to scores: what rewards see of a data row.

Images that a person has at hand are scored by `evaluate/judge.py`.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.dataset import Batches, Entry
from ..data.sample import Sample
from ..rewards import Composite, Context, Reward, metrics

logger = logging.getLogger(__name__)

KEPT_BYTES = 256 << 20  # of rows that a scorer remembers: their images are float32, 7 MB each at 512 pixels
LOOKED_AT = 64  # rows that `RowScorer.check` reads at most


@dataclass(frozen=True)
class Row:
    """What a reward may see of one data row; images [H,W,3] in 0..1, mask [H,W], 1 = edited.

    source, mask: None where the row has none. diptych: the model paints [source | edit].
    """

    prompt: str
    target: Tensor | None
    source: Tensor | None = None
    mask: Tensor | None = None
    diptych: bool = False

    @property
    def bytes(self) -> int:
        """Memory that its images take."""
        return sum(
            t.numel() * t.element_size() for t in (self.target, self.source, self.mask) if t is not None
        )

    @property
    def kind(self) -> tuple:
        """Rows of one kind can be judged together."""
        shown = self.source if self.target is None else self.target
        return self.diptych, self.source is None, self.mask is None, tuple(shown.shape)


def read_row(batches: Batches, number: int, targets: bool = True) -> Row:
    """Row `number` preprocessed as for the model: one panel of a diptych, not both.

    Where an image is filled instead of edited, source and target are the image itself and the mask is
    the hole. An edit's mask is the row's own or, if the target image may be seen (`targets`), where that
    differs from the source.
    """
    entry = batches.entries[number]
    sample = batches.corpus.source[entry.index]
    if sample.encoded is not None:
        return _decoded_row(batches, entry, sample, targets)
    preprocessed = batches.corpus.preprocess(sample)[entry.variant]
    target = ((preprocessed.pixels + 1) / 2).movedim(0, -1)
    if not entry.diptych and preprocessed.reference is None:
        hole = None if preprocessed.mask is None else preprocessed.mask[0]
        return Row(sample.prompt, target, None if hole is None else target, hole)
    if entry.diptych:
        width = target.shape[1] // 2
        source, target = target[:, :width], target[:, width:]
    else:
        source = ((preprocessed.reference + 1) / 2).movedim(0, -1)
    mask = preprocessed.edited
    if mask is None and targets:
        mask = metrics.changed_region(source[None], target[None])[0]
    return Row(sample.prompt, target, source, mask, entry.diptych)


@torch.no_grad()
def _decoded_row(batches: Batches, entry: Entry, sample: Sample, targets: bool) -> Row:
    """A precomputed row: the source is what the VAE makes of the masked image, grey where its hole is."""
    tensors, host = batches.caches.image(entry.key), batches.task.host
    images = {
        name: host.decode(tensors[name][None].float())[0].float().cpu()
        for name in ("masked_latents", "latents")
        if name in tensors
    }
    source, target, mask = images["masked_latents"], images.get("latents"), _stored_mask(entry, sample)
    if entry.diptych:
        width = source.shape[1] // 2
        source, target = source[:, :width], None if target is None else target[:, width:]
    if mask is None and targets and target is not None:
        mask = metrics.changed_region(source[None], target[None])[0]
    return Row(sample.prompt, target, source, mask, entry.diptych)


def _stored_mask(entry: Entry, sample: Sample) -> Tensor | None:
    """The mask [H,W] of a precomputed row's image or edited panel; None where it does not say what an edit
    touches, being of the whole panel.
    """
    if not entry.diptych:
        return sample.mask
    width, edited = sample.mask.shape[1] // 2, sample.encoded.edited
    panel = (sample.mask if edited is None else edited)[:, width:]
    return None if edited is None and panel.min() >= 0.5 else panel


class RowScorer:
    """Scores finished images of data rows by rewards; remembers the last rows it has read."""

    def __init__(self, rewards: Composite, batches: Batches):
        """Rewards see the target images where all rows have one (`targets`)."""
        self.rewards, self.batches, self.targets = rewards, batches, batches.targets
        self._rows: OrderedDict[int, Row] = OrderedDict()
        self._bytes = 0
        self._said: set[str] = set()

    def row(self, number: int) -> Row:
        """Row `number` of the data; the least recently used are forgotten beyond `KEPT_BYTES`."""
        if number in self._rows:
            self._rows.move_to_end(number)
            return self._rows[number]
        row = self._rows[number] = read_row(self.batches, number, self.targets)
        self._bytes += row.bytes
        while self._bytes > KEPT_BYTES and len(self._rows) > 1:
            self._bytes -= self._rows.popitem(last=False)[1].bytes
        return row

    def check(self) -> None:
        """Raise ValueError for a reward that can judge none of the first rows, for lack of what it needs."""
        lacking = {reward.name: "" for reward in self.rewards.rewards}
        for number in range(min(LOOKED_AT, len(self.batches.entries))):
            given = self._given(number)
            lacking = {r.name: r.missing(given) for r in self.rewards.rewards if r.name in lacking}
            lacking = {name: what for name, what in lacking.items() if what}
            if not lacking:
                return
        name, what = next(iter(lacking.items()))
        raise ValueError(
            f"reward {name} needs {what}, which the data has not: choose other rewards or other data (masks "
            "of a folder of pairs are NAME_mask.png)"
        )

    def _given(self, number: int) -> set[str]:
        """What rewards would be given of a row; a precomputed one is not decoded for it."""
        entry = self.batches.entries[number]
        sample = self.batches.corpus.source[entry.index]
        if sample.encoded is None:
            return self._context([self.row(number)]).given
        given = {"prompts", "sources"} | ({"targets", "masks"} if self.targets else set())
        return given | (set() if _stored_mask(entry, sample) is None else {"masks"})

    def _context(self, rows: Sequence[Row]) -> Context:
        """What rewards see of rows of one kind."""

        def stacked(name: str) -> Tensor | None:
            values = [getattr(row, name) for row in rows]
            return None if values[0] is None else torch.stack(values)

        targets = stacked("target") if self.targets else None
        return Context([row.prompt for row in rows], stacked("source"), stacked("mask"), targets)

    def score(self, images: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Raw scores [N] by reward of images [N,H,W,3] in 0..1, both panels of a diptych, of rows `numbers`.

        NaN where a reward lacks what it needs, has nothing to judge or failed.
        """
        images = images.float().cpu()
        rows = [self.row(number) for number in numbers]
        out = {reward.name: torch.full((len(rows),), torch.nan) for reward in self.rewards.rewards}
        for kind in dict.fromkeys(row.kind for row in rows):
            places = [place for place, row in enumerate(rows) if row.kind == kind]
            some = [rows[place] for place in places]
            shown, context = images[places], self._context(some)
            if some[0].diptych:
                shown = shown[:, :, shown.shape[2] // 2 :]
            for reward in self.rewards.rewards:
                out[reward.name][places] = self._judged(reward, shown, context)
        return out

    def _judged(self, reward: Reward, shown: Tensor, context: Context) -> Tensor:
        """The scores [n] of one reward; NaN where it lacks something."""
        if lacking := reward.missing(context.given):
            self._say(f"reward {reward.name} needs {lacking}: rows without are not judged by it")
            return torch.full((len(shown),), torch.nan)
        if "masks" in reward.needs and any(mask.min() >= 0.5 for mask in context.masks):
            self._say(f"reward {reward.name}: rows whose mask covers all of the image have nothing to keep")
        return reward.score(shown, context)

    def _say(self, sentence: str) -> None:
        """Log it once."""
        if sentence not in self._said:
            self._said.add(sentence)
            logger.warning(sentence)


def judged(scores: dict[str, Tensor]) -> dict[str, float]:
    """Mean by reward over what it judged; rewards that judged nothing are left out."""
    means = {name: float(values.nanmean()) for name, values in scores.items()}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}
