"""From finished pictures to scores: what rewards see of a data row, and how recipes name rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data.sample import Sample
from .feed import Batches, Entry
from .rewards import Composite, from_recipe


@dataclass(frozen=True)
class Row:
    """What a reward may see of one data row; pictures [H,W,3] in 0..1, mask [H,W], 1 = edited."""

    prompt: str
    source: Tensor
    target: Tensor | None
    mask: Tensor


def read_row(batches: Batches, number: int) -> Row:
    """Row `number` as its pictures were arranged for the model: one panel of a diptych, not both.

    Where a picture is filled instead of edited, source and target are the picture itself.
    """
    entry = batches.entries[number]
    sample = batches.corpus.source[entry.index]
    if sample.encoded is not None:
        return _decoded_row(batches, entry, sample)
    arranged = batches.corpus.read(entry.index)[entry.variant]
    pixels = ((arranged.pixels + 1) / 2).movedim(0, -1)
    mask = None if arranged.mask is None else arranged.mask[0]
    source = None if arranged.reference is None else ((arranged.reference + 1) / 2).movedim(0, -1)
    if is_diptych(batches, number):
        width = pixels.shape[1] // 2
        source, pixels, mask = pixels[:, :width], pixels[:, width:], mask[:, width:]
    if source is not None and sample.mask is not None:
        # The panel's mask covers all of it; the row's own says what the instruction touches.
        mask = _at_size(sample.mask, pixels.shape[0], pixels.shape[1])
    mask = torch.ones(pixels.shape[:2]) if mask is None else mask
    return Row(sample.prompt, pixels if source is None else source, pixels, mask)


@torch.no_grad()
def _decoded_row(batches: Batches, entry: Entry, sample: Sample) -> Row:
    """A precomputed row: the source is what the VAE makes of the masked picture, grey where its hole is."""
    tensors, host = batches.latents.picture(entry.key), batches.task.host
    pictures = {
        name: host.decode(tensors[name][None].float())[0].float().cpu()
        for name in ("masked_latents", "latents")
        if name in tensors
    }
    source, target, mask = pictures["masked_latents"], pictures.get("latents"), sample.mask
    if entry.diptych:
        width = source.shape[1] // 2
        source, mask = source[:, :width], mask[:, width:]
        target = None if target is None else target[:, width:]
    return Row(sample.prompt, source, target, mask)


def is_diptych(batches: Batches, number: int) -> bool:
    """Whether the row's picture is [source | edit]."""
    return batches.entries[number].diptych


def _at_size(mask: Tensor, height: int, width: int) -> Tensor:
    return torch.nn.functional.interpolate(mask[None, None].float(), (height, width), mode="nearest")[0, 0]


def make_rewards(entries: Sequence[str], options: Sequence[str]) -> Composite:
    """Recipe lines `NAME` or `NAME=WEIGHT`, and options `NAME.KEY=VALUE`, as weighted rewards.

    Raises ValueError if none is named, or an option names a reward that is not used.
    """
    if not entries:
        raise ValueError("rewards is empty: name at least one, for example rewards: [pickscore]")
    chosen: dict[str, dict[str, object]] = {}
    weights: dict[str, float] = {}
    for entry in entries:
        name, _, weight = entry.partition("=") if not entry.startswith("http") else (entry, "", "")
        chosen[name], weights[name] = {"name": name}, float(weight or 1)
    for option in options:
        key, _, value = option.partition("=")
        name, _, key = key.rpartition(".")
        if name not in chosen or not key:
            raise ValueError(f"reward option {option!r}: write NAME.KEY=VALUE with one of {sorted(chosen)}")
        chosen[name][key] = _number(value)
    rewards = {name: from_recipe(entry) for name, entry in chosen.items()}
    return Composite(list(rewards.values()), {reward.name: weights[name] for name, reward in rewards.items()})


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class Judge:
    """Scores finished pictures of data rows with a composite; remembers the rows it has read."""

    def __init__(self, rewards: Composite, batches: Batches, targets: bool = True):
        """targets: whether rewards may see the finished images, where all rows have one.

        Raises ValueError if a reward needs what the data has not.
        """
        self.rewards, self.batches, self.targets = rewards, batches, targets and batches.targets
        given = {"prompts", "sources", "masks", *(["targets"] if self.targets else [])}
        if lacking := rewards.missing(given):
            raise ValueError(f"{lacking}, which the data has not: choose other rewards or other data")
        self._rows: dict[int, Row] = {}

    def row(self, number: int) -> Row:
        if number not in self._rows:
            self._rows[number] = read_row(self.batches, number)
        return self._rows[number]

    def __call__(self, pictures: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
        """pictures [N,H,W,3], both panels of a diptych, and the row of each -> raw scores [N] by reward."""
        pictures = pictures.float().cpu()
        if is_diptych(self.batches, numbers[0]):
            pictures = pictures[:, :, pictures.shape[2] // 2 :]
        rows = [self.row(number) for number in numbers]
        beside = {
            "prompts": [row.prompt for row in rows],
            "sources": torch.stack([row.source for row in rows]),
            "masks": torch.stack([row.mask for row in rows]),
            "targets": torch.stack([row.target for row in rows]) if self.targets else None,
        }
        return self.rewards.score(pictures, **beside).raw
