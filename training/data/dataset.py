"""What the trainer eats: the rows of its data, encoded once (or every step), and the batch of any step.

`Corpus` reads, `Latents` are the caches (`encode.py` fills them), `Batches` gives tensors. Which rows make up
step n is `data.buckets.BucketBatchSampler`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..runtime.fingerprints import stamp
from ..runtime.random_streams import row_generator
from . import prior
from .buckets import BucketBatchSampler
from .cache import ContentCache, fingerprint, text_key
from .preprocess import Arranged, Arranger
from .sample import Sample
from .sources import open_source

DROPPED_PROMPT = " "
Progress = Callable[[Iterable, str], Iterable]


def silent(items: Iterable, label: str) -> Iterable:
    """No progress bar."""
    return items


@dataclass(frozen=True)
class Entry:
    """One trainable row: example `index` of the source with its mask `variant`, and where its latents are.

    diptych: the image is [source | edit]. target: there is a target image, not the source in its place.
    text, tokens, ids: of rows that bring their prompt encoded, the key of that embedding, its length, and a
    hash of its positions if they are not the usual zeros.
    """

    index: int
    variant: int
    key: str
    prompt: str
    size: tuple[int, int]
    weight: float = 1.0
    prior: bool = False
    diptych: bool = False
    target: bool = True
    text: str = ""
    tokens: int = 0
    ids: str = ""

    @property
    def bucket(self) -> tuple[int, int, bool, str]:
        """What rows must share to be in one batch: the image's size and layout, and the text's positions."""
        return (*self.size, self.diptych, self.ids)


class Corpus:
    """The rows of a configuration's data, arranged; shared by caching and by training without a cache."""

    def __init__(self, config, template: str, specs: list[str] | None = None, limit: int = 0):
        """`specs`: other sources than the configuration's (sample pictures), without class pictures."""
        self.config = config
        self.source = open_source(list(config.data if specs is None else specs), config.seed, limit)
        if specs is None:
            self.source = prior.with_class(self.source, config)
        self.arranger = Arranger(config, template)
        c = config
        options = (
            c.task,
            c.layout,
            c.resolution,
            c.sizing,
            c.bucket_step,
            c.mask_kinds,
            c.mask_variants,
            c.seed,
        )
        more = ("entries 3", *(("touched",) if c.edit_loss_weight else ()))  # 3: what an entry says
        self.stamp = stamp(
            self.source.fingerprint, options, self.arranger.template, c.vae_sample, c.edit_masks, *more
        )

    def places(self) -> dict[int, int]:
        """Each index and the first one that is the same example (a mix repeats examples)."""
        first: dict[str, int] = {}
        return {i: first.setdefault(self.source.name(i), i) for i in range(len(self.source))}

    def read(self, index: int) -> list[Arranged] | Sample:
        """All mask variants of a row, or the sample itself where it is precomputed. Raises BrokenSample."""
        return self.arranged(self.source[index])

    def arranged(self, sample: Sample) -> list[Arranged] | Sample:
        """The same of a sample that was read already."""
        if sample.encoded is not None:
            self._check_precomputed(sample)
            return sample
        seeds = [f"mask {sample.name} {variant}" for variant in range(self.arranger.variants(sample))]
        return [self.arranger(sample, row_generator(self.config.seed, 0, text)) for text in seeds]

    def _check_precomputed(self, sample: Sample) -> None:
        """Raise ValueError for what a row without pictures cannot do."""
        c = self.config
        if c.task != "fill":
            raise ValueError(f"{sample.name} is encoded for FLUX Fill, the task is {c.task}: set task=fill")
        if c.edit_loss_weight or c.text_lengths:
            raise ValueError(
                "edit_loss_weight and text_lengths need pictures and prompts, which precomputed data has "
                "not: leave them out"
            )
        if c.needs_targets and sample.encoded.latents is None:
            raise ValueError(
                f"{sample.name} has no latents_path, the target image that supervised training learns: "
                "train on it by reward (diptych grpo), or encode it again with diptych precompute --targets"
            )


class Latents:
    """The picture and text caches of one task's encoders, under `folder`."""

    def __init__(self, task: Any, folder: Path):
        config = task.config
        self.dtype = getattr(torch, config.cache_dtype)
        how = ("sample" if config.vae_sample else "mode", config.cache_dtype, task.name)
        self.task = task
        self.picture_print = fingerprint(task.vae, *how)
        self.pictures = ContentCache(folder / "pictures")
        self.texts = ContentCache(folder / "texts")
        self.memory: dict[str, dict[str, Tensor]] | None = None

    @cached_property
    def text_print(self) -> str:
        """Of the text encoders; for a hub id they are loaded for it, so not before a prompt is encoded."""
        return self.task.text_fingerprint()

    def cast(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in tensors.items()}

    def text(self, prompt: str) -> dict[str, Tensor]:
        return self.text_at(text_key(prompt, self.text_print))

    def text_at(self, key: str) -> dict[str, Tensor]:
        return self._get(self.texts, key)

    def picture(self, key: str) -> dict[str, Tensor]:
        return self._get(self.pictures, key)

    def _get(self, cache: ContentCache, key: str) -> dict[str, Tensor]:
        if self.memory is None:
            return cache.get(key)
        if key not in self.memory:
            self.memory[key] = cache.get(key)
        return self.memory[key]


class Batches:
    """Tensors of given entries, from the caches or (`latents` None) encoded now, every time."""

    def __init__(self, entries: list[Entry], task: Any, latents: Latents | None, corpus: Corpus):
        if not entries:
            raise ValueError("no usable row in the data: check the sources")
        self.entries, self.task, self.latents, self.corpus = entries, task, latents, corpus
        self.targets = all(entry.target for entry in entries)
        self.has_latents = all(entry.target or not entry.text for entry in entries)
        self.longest = _common_length(entries, task)

    def __call__(self, numbers: list[int], drop: list[bool]) -> dict[str, Any]:
        """One batch; rows marked in `drop` get the dropped prompt.

        Floats in float32, text as the model takes it (`Task.text_dtype`).
        `latents` is in it unless a precomputed row has none; see `latents_like` for their shape.
        """
        entries = [self.entries[i] for i in numbers]
        prompts = [DROPPED_PROMPT if d else e.prompt for e, d in zip(entries, drop, strict=True)]
        if self.latents is None:
            batch: dict[str, Any] = self.task.encode_images(
                [self.corpus.read(e.index)[e.variant] for e in entries]
            )
        else:
            rows = [self.latents.picture(e.key) for e in entries]
            if not self.has_latents:
                rows = [{name: value for name, value in row.items() if name != "latents"} for row in rows]
            batch = _stack(rows)
        if not self.task.config.train_text_encoder:
            batch |= self._texts(entries, prompts, drop)
        kinds = dict.fromkeys(("tokens", "pooled"), self.task.text_dtype)
        batch = {
            k: v.to(kinds.get(k, torch.float32)) if v.is_floating_point() else v for k, v in batch.items()
        }
        batch["prompts"] = prompts
        batch["weight"] = torch.tensor([e.weight for e in entries])
        batch["prior"] = torch.tensor([e.prior for e in entries])
        return batch

    def _texts(self, entries: list[Entry], prompts: list[str], drop: list[bool]) -> dict[str, Tensor]:
        if not any(entry.text for entry in entries):
            return _alike(self.text(prompts), self.longest)
        rows = [
            self.latents.text_at(e.text) if e.text and not d else self.latents.text(p)
            for e, p, d in zip(entries, prompts, drop, strict=True)
        ]
        ids = next((row["text_ids"] for row in rows if "text_ids" in row), None)
        length = self.longest or len(rows[0]["tokens"])
        rows = [_alike({k: v[None] for k, v in row.items() if k != "text_ids"}, self.longest) for row in rows]
        out = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        if ids is not None:  # of the batch, see `Entry.bucket`: what a model takes has no batch axis
            out["text_ids"] = pad(ids, (0, 0, 0, length - len(ids))).expand(len(rows), -1, -1)
        return out

    @torch.no_grad()
    def text(self, prompts: list[str]) -> dict[str, Tensor]:
        if self.latents is None:
            return self.task.encode_text(prompts)
        return _stack([self.latents.text(p) for p in prompts])

    def sampler(
        self, batch: int, seed: int, rank: int, world: int, *, prior: bool
    ) -> BucketBatchSampler | None:
        """The order of the instance rows, or of the class rows (None if there are none)."""
        chosen = [i for i, e in enumerate(self.entries) if e.prior == prior]
        if not chosen:
            if prior:
                return None
            raise ValueError("the data holds class rows only: add instance rows")
        buckets = sorted({self.entries[i].bucket for i in chosen})
        where = [buckets.index(self.entries[i].bucket) for i in chosen]
        return BucketBatchSampler(where, batch, seed=seed, rank=rank, world_size=world, indices=chosen)

    def fingerprint(self) -> str:
        """Hash of everything that can be seen; goes into the saved file's header."""
        own_text = [(e.text,) if e.text else () for e in self.entries]
        return stamp(
            [(e.key, e.prompt, e.weight, e.prior, *t) for e, t in zip(self.entries, own_text, strict=True)]
        )


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def latents_like(batch: dict[str, Any]) -> Tensor:
    """A tensor of a batch that has the shape and device of its latents, which itself may be absent."""
    return batch["latents"] if "latents" in batch else batch["masked_latents"]


def _common_length(entries: list[Entry], task: Any) -> int:
    """The text length that every batch is brought to; 0 where all rows have one length anyway."""
    if not any(entry.tokens for entry in entries):
        return 0
    lengths = {entry.tokens or task.tokens for entry in entries}
    if task.config.prompt_drop:
        lengths.add(task.tokens)
    return max(lengths) if len(lengths) > 1 else 0


def _alike(text: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Text of [B,L,D] `tokens` filled up to `length` (0: as it is) with tokens that no attention looks at.

    FLUX gives text no attention mask, so plain padding would change the prediction; `text_bias` [B,length]
    says minus infinity where there was nothing.
    """
    if not length:
        return text
    missing = length - text["tokens"].shape[1]
    bias = pad(text["tokens"].new_zeros(text["tokens"].shape[:2]), (0, missing), value=-torch.inf)
    return {**text, "tokens": pad(text["tokens"], (0, 0, 0, missing)), "text_bias": bias}
