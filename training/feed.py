"""What the trainer eats: the rows of its data, encoded once (or every step), and the batch of any step.

`Corpus` reads, `Latents` are the caches (`encode.py` fills them), `Batches` gives tensors. Which rows make up
step n is `data.buckets.BucketBatchSampler`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import prior
from .arrange import Arranged, Arranger
from .data.broken import BrokenSample
from .data.buckets import BucketBatchSampler
from .data.cache import ContentCache, fingerprint, text_key
from .data.sample import Sample, stamp
from .data.sources import open_source
from .losses import row_generator

DROPPED_PROMPT = " "
Progress = Callable[[Iterable, str], Iterable]


def silent(items: Iterable, label: str) -> Iterable:
    """No progress bar."""
    return items


@dataclass(frozen=True)
class Entry:
    """One trainable row: example `index` of the source with its mask `variant`, and where its latents are."""

    index: int
    variant: int
    key: str
    prompt: str
    size: tuple[int, int]
    weight: float = 1.0
    prior: bool = False


class Corpus:
    """The rows of a configuration's data, arranged; shared by caching and by training without a cache."""

    def __init__(self, config, template: str, specs: list[str] | None = None, limit: int = 0):
        """`specs`: other sources than the configuration's (sample pictures), without class pictures."""
        self.config = config
        self.source = open_source(
            list(config.data if specs is None else specs), config.seed, limit or config.data_limit
        )
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
        more = ("touched",) if c.edit_loss_weight else ()
        self.stamp = stamp(
            self.source.fingerprint, options, self.arranger.template, c.vae_sample, c.edit_masks, *more
        )

    def places(self) -> dict[int, int]:
        """Each index and the first one that is the same example (a mix repeats examples)."""
        first: dict[str, int] = {}
        return {i: first.setdefault(self.source.name(i), i) for i in range(len(self.source))}

    def read(self, index: int) -> list[Arranged] | Sample:
        """All mask variants of a row, or the sample itself where it is precomputed. Raises BrokenSample."""
        sample = self.source[index]
        if sample.encoded is not None:
            if self.config.edit_loss_weight or self.config.text_lengths:
                raise ValueError(
                    "edit_loss_weight and text_lengths need pictures and prompts, which precomputed data has "
                    "not: leave them out"
                )
            if sample.encoded.latents is None:
                raise BrokenSample(sample.name, "latents/ is missing: rows without a target serve GRPO only")
            return sample
        seeds = [f"mask {sample.name} {variant}" for variant in range(self.arranger.variants(sample))]
        return [self.arranger(sample, row_generator(self.config.seed, 0, text)) for text in seeds]


class Latents:
    """The picture and text caches of one task's encoders, under `folder`."""

    def __init__(self, task: Any, folder: Path):
        config = task.config
        self.dtype = getattr(torch, config.cache_dtype)
        how = ("sample" if config.vae_sample else "mode", config.cache_dtype, task.name)
        self.picture_print = fingerprint(task.vae, *how)
        self.text_print = task.text_fingerprint()
        self.pictures = ContentCache(folder / "pictures")
        self.texts = ContentCache(folder / "texts")
        self.memory: dict[str, dict[str, Tensor]] | None = None

    def cast(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in tensors.items()}

    def text(self, prompt: str) -> dict[str, Tensor]:
        return self._get(self.texts, text_key(prompt, self.text_print))

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

    def __call__(self, numbers: list[int], drop: list[bool]) -> dict[str, Any]:
        """One batch; rows marked in `drop` get the dropped prompt. Floats in float32."""
        entries = [self.entries[i] for i in numbers]
        prompts = [DROPPED_PROMPT if d else e.prompt for e, d in zip(entries, drop, strict=True)]
        if self.latents is None:
            batch: dict[str, Any] = self.task.encode_pictures(
                [self.corpus.read(e.index)[e.variant] for e in entries]
            )
        else:
            batch = _stack([self.latents.picture(e.key) for e in entries])
        if not self.task.config.train_text_encoder:
            batch |= self.text(prompts)
        batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
        batch["prompts"] = prompts
        batch["weight"] = torch.tensor([e.weight for e in entries])
        batch["prior"] = torch.tensor([e.prior for e in entries])
        return batch

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
        sizes = sorted({self.entries[i].size for i in chosen})
        where = [sizes.index(self.entries[i].size) for i in chosen]
        return BucketBatchSampler(where, batch, seed=seed, rank=rank, world_size=world, indices=chosen)

    def fingerprint(self) -> str:
        """Hash of everything that can be seen; goes into the saved file's header."""
        return stamp([(e.key, e.prompt, e.weight, e.prior) for e in self.entries])


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
