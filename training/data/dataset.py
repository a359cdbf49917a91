"""The dataset of a run: its rows, encoded once (or every step), and the batch of any step.

Which rows make up step n is `buckets.BucketBatchSampler`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..runtime.fingerprints import stamp
from ..runtime.processes import Processes, Progress
from .buckets import BucketBatchSampler
from .encode import Caches, Entry, encode_corpus, encode_prompts, list_corpus
from .preprocess import Corpus

DROPPED_PROMPT = " "


@dataclass(frozen=True)
class Corpora:
    """The rows to train on, and those of the sample images (the same object where they have none)."""

    rows: Corpus
    samples: Corpus


@dataclass(frozen=True)
class PreparedData:
    """The data of a run, encoded as far as they are to be.

    sampler, class_sampler: the order of instance and of class rows (None without class rows). template: the
    text around instructions. notes: what was done to the data, for reports.
    """

    batches: Batches
    sample_batches: Batches
    sampler: BucketBatchSampler
    class_sampler: BucketBatchSampler | None
    template: str
    notes: tuple[str, ...] = ()

    def order(self, micro: int) -> Iterator[list[int]]:
        """Row numbers of every micro-batch from number `micro` on: instance rows, then as many class rows if
        there are any. It never ends.
        """
        rows = iter(self.sampler.start_at(micro))
        if self.class_sampler is None:
            return rows
        pairs = zip(rows, self.class_sampler.start_at(micro), strict=True)
        return (instance + prior for instance, prior in pairs)


def open_data(config: Any, template: str) -> Corpora:
    """Open the data of a configuration. template: the task's own text around instructions.

    Raises ValueError or FileNotFoundError if they cannot be opened.
    """
    rows = samples = Corpus(config, template)
    if config.sample_data:
        samples = Corpus(config, template, config.sample_data, config.held_out_rows)
    return Corpora(rows, samples)


def prepare(corpora: Corpora, task: Any, processes: Processes, progress: Progress) -> PreparedData:
    """Encode the data into the caches, if there are to be caches, and give their batches.

    All processes call it; each encodes its share. Raises ValueError for data that cannot be used.
    """
    c, caches, shared = corpora.rows.config, None, corpora.samples is corpora.rows
    if c.cache:
        caches = Caches(task, Path(c.cache_dir or Path(c.output_dir) / "cache"))
        rows = encode_corpus(corpora.rows, caches, processes, progress)
        samples = rows if shared else encode_corpus(corpora.samples, caches, processes, progress)
    else:
        task.text_to_device()
        rows = list_corpus(corpora.rows)
        samples = rows if shared else list_corpus(corpora.samples)
    if caches and c.train_text_encoder:
        task.text_to_device()
    elif caches:
        prompts = {e.prompt for e in rows + samples if not e.text} | needed_prompts(c)
        encode_prompts(prompts, caches, processes, progress)
    if caches and c.cache_in_memory:
        caches.memory = {}
    batches = Batches(rows, task, caches, corpora.rows)
    order = (c.batch_size, c.seed, processes.rank, processes.world)
    data = PreparedData(
        batches,
        Batches(samples[: c.held_out_rows], task, caches, corpora.samples),
        batches.sampler(*order, prior=False),
        batches.sampler(*order, prior=True),
        corpora.rows.preprocessor.template,
        tuple(filter(None, [corpora.rows.preprocessor.report()])),
    )
    if data.class_sampler is not None and len({e.bucket for e in rows}) > 1:
        raise ValueError("prior preservation needs images of one size: set sizing: squash")
    return data


def needed_prompts(config: Any) -> set[str]:
    """The prompts that a run needs beside those of its rows."""
    dropped = {DROPPED_PROMPT} if config.prompt_drop else set()
    return dropped | ({""} if config.task in ("sd_inpaint", "glid") else set())  # of classifier-free guidance


class Batches:
    """Tensors of given entries, from the caches or (`caches` None) encoded now, every time."""

    def __init__(self, entries: list[Entry], task: Any, caches: Caches | None, corpus: Corpus):
        """task: of `tasks/`. Raises ValueError without entries."""
        if not entries:
            raise ValueError("no usable row in the data: check the sources")
        self.entries, self.task, self.caches, self.corpus = entries, task, caches, corpus
        self.targets = all(entry.target for entry in entries)
        self.has_latents = all(entry.target or not entry.text for entry in entries)
        self.longest = _common_length(entries, task)

    def __call__(self, numbers: list[int], drop: list[bool]) -> dict[str, Any]:
        """One batch; rows marked in `drop` get the dropped prompt, unless the model has a vector for it.

        Floats in float32, text as the model takes it (`Task.text_dtype`).
        `latents` is in it unless a precomputed row has none; see `latents_like` for their shape.
        """
        entries = [self.entries[i] for i in numbers]
        drop = [d and not self.task.null_text for d in drop]
        prompts = [DROPPED_PROMPT if d else e.prompt for e, d in zip(entries, drop, strict=True)]
        if self.caches is None:
            batch: dict[str, Any] = self.task.encode_images(
                [self.corpus.read(e.index)[e.variant] for e in entries]
            )
        else:
            rows = [self.caches.image(e.key) for e in entries]
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
            self.caches.text_at(e.text) if e.text and not d else self.caches.text(p)
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
        """What `Task.encode_text` gives of these prompts, batched, without gradient."""
        if self.caches is None:
            return self.task.encode_text(prompts)
        return _stack([self.caches.text(p) for p in prompts])

    def sampler(
        self, batch: int, seed: int, rank: int, world: int, *, prior: bool
    ) -> BucketBatchSampler | None:
        """The order of the instance rows, or of the class rows (None if there are none).

        batch: rows of one process in one step. Raises ValueError where all rows are class rows.
        """
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
