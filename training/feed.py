"""What the trainer eats: the rows of its data, encoded once (or every step), and the batch of any step.

`Corpus` reads and lists, `encode_corpus` fills the caches and can be killed and resumed, `Batches` gives
tensors. Which rows make up step n is `data.buckets.BucketBatchSampler`'s business.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import prior
from .arrange import Arranged, Arranger
from .data.broken import Broken, BrokenSample
from .data.buckets import BucketBatchSampler
from .data.cache import ContentCache, fingerprint, image_key, text_key
from .data.sample import Sample, stamp
from .data.sources import open_source
from .losses import row_generator

logger = logging.getLogger(__name__)

DROPPED_PROMPT = " "
LINES = 256  # rows between two flushes of the cache
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
        self.stamp = stamp(
            self.source.fingerprint, options, self.arranger.template, c.vae_sample, c.edit_masks
        )

    def places(self) -> dict[int, int]:
        """Each index and the first one that is the same example (a mix repeats examples)."""
        first: dict[str, int] = {}
        return {i: first.setdefault(self.source.name(i), i) for i in range(len(self.source))}

    def read(self, index: int) -> list[Arranged] | Sample:
        """All mask variants of a row, or the sample itself where it is precomputed. Raises BrokenSample."""
        sample = self.source[index]
        if sample.encoded is not None:
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
        parts = [p if isinstance(p, torch.nn.Module) else str(p.name_or_path) for p in task.parts.values()]
        self.text_print = fingerprint(*parts, str(config.max_sequence_length), config.cache_dtype)
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


def encode_corpus(
    corpus: Corpus,
    task: Any,
    latents: Latents,
    folder: Path,
    progress: Progress,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Encode this process' share of the rows and note them in `folder`; what is noted and cached is not
    reread.

    Raises ValueError with the list when more than 5 % of the rows are broken.
    """
    listing = folder / f"rows-{stamp(corpus.stamp, latents.picture_print)}"
    listing.mkdir(parents=True, exist_ok=True)
    places = sorted(set(corpus.places().values()))
    noted = {entry.index for entry in read_entries(corpus, latents, folder)}
    todo = [i for i in places[rank::world] if i not in noted]
    broken = Broken(max(1, len(places) // world))
    waiting: dict[tuple, list[tuple[Entry, Arranged]]] = {}
    done: dict[int, list[Entry]] = {}
    wanted: dict[int, int] = {}  # variants of each row under way

    def encode(group: list[tuple[Entry, Arranged]]) -> None:
        batch = latents.cast(task.encode_pictures([item for _, item in group]))
        for i, (entry, _) in enumerate(group):
            latents.pictures.put(entry.key, {name: t[i] for name, t in batch.items()})
            done[entry.index].append(entry)
        group.clear()

    def write() -> None:
        # Pictures first: a line must never name latents that are not on disk.
        latents.pictures.flush()
        latents.texts.flush()
        whole = [index for index, entries in done.items() if len(entries) == wanted[index]]
        with open(listing / f"{rank:03d}.jsonl", "a", encoding="utf-8") as file:
            for index in whole:
                file.writelines(json.dumps(asdict(entry)) + "\n" for entry in done.pop(index))

    try:
        for index in progress(todo, "caching pictures"):
            try:
                rows = corpus.read(index)
            except BrokenSample as error:
                broken.record(error)
                continue
            if isinstance(rows, Sample):
                done[index], wanted[index] = [_keep_precomputed(rows, index, latents)], 1
                continue
            done[index], wanted[index] = [], len(rows)
            for variant, item in enumerate(rows):
                key = image_key(item.encoded_parts[0], latents.picture_print, *item.encoded_parts[1:])
                entry = Entry(index, variant, key, item.prompt, item.size, item.weight, item.prior)
                if key in latents.pictures:
                    done[index].append(entry)
                    continue
                group = waiting.setdefault((item.size, item.reference is None), [])
                group.append((entry, item))
                if len(group) >= corpus.config.encode_batch:
                    encode(group)
            if len(done) >= LINES:
                write()
        for group in waiting.values():
            if group:
                encode(group)
    finally:  # an interrupted run keeps what it has encoded
        write()
    if message := broken.close():
        logger.warning(message)


def _keep_precomputed(sample: Sample, index: int, latents: Latents) -> Entry:
    ready = sample.encoded
    mask = ready.mask[None].to(torch.uint8)
    parts = {"latents": ready.latents, "masked_latents": ready.masked_latents, "mask": mask}
    key = image_key(ready.latents, latents.picture_print, ready.masked_latents, mask)
    latents.pictures.put(key, latents.cast(parts))
    prompt = sample.prompt or sample.name
    text = {"tokens": ready.prompt_embed, "pooled": ready.pooled_prompt_embeds}
    latents.texts.put(text_key(prompt, latents.text_print), latents.cast(text))
    return Entry(index, 0, key, prompt, tuple(mask.shape[-2:]))


def read_entries(corpus: Corpus, latents: Latents, folder: Path) -> list[Entry]:
    """All rows noted by all processes whose latents are cached, in row order: the same on every process."""
    latents.pictures.refresh()
    listing = folder / f"rows-{stamp(corpus.stamp, latents.picture_print)}"
    found: dict[tuple[int, int], Entry] = {}
    for path in sorted(listing.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                item = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run
            entry = Entry(**{**item, "size": tuple(item["size"])})
            if entry.key in latents.pictures:
                found[(entry.index, entry.variant)] = entry
    by_first: dict[int, list[Entry]] = {}
    for entry in (found[place] for place in sorted(found)):
        by_first.setdefault(entry.index, []).append(entry)
    return [entry for first in corpus.places().values() for entry in by_first.get(first, [])]


def encode_prompts(
    prompts: Iterable[str], task: Any, latents: Latents, progress: Progress, rank: int = 0, world: int = 1
) -> None:
    """Encode this process' share of the prompts that are not cached yet."""
    missing = [p for p in sorted(set(prompts)) if text_key(p, latents.text_print) not in latents.texts]
    mine, step = missing[rank::world], task.config.encode_batch
    try:
        for start in progress(range(0, len(mine), step), "caching prompts"):
            some = mine[start : start + step]
            with torch.no_grad():
                batch = latents.cast(task.encode_text(some))
            for i, prompt in enumerate(some):
                latents.texts.put(
                    text_key(prompt, latents.text_print), {name: t[i] for name, t in batch.items()}
                )
    finally:
        latents.texts.flush()


def list_corpus(corpus: Corpus) -> list[Entry]:
    """Entries of all readable rows without encoding anything, for training without a cache."""
    places = corpus.places()
    broken = Broken(len(set(places.values())))
    by_first: dict[int, list[Entry]] = {}
    for index in sorted(set(places.values())):
        try:
            rows = corpus.read(index)
        except BrokenSample as error:
            broken.record(error)
            continue
        if isinstance(rows, Sample):
            raise ValueError("cache is off but the data is precomputed: set cache: true")
        by_first[index] = [
            Entry(index, v, image_key(r.pixels, ""), r.prompt, r.size, r.weight, r.prior)
            for v, r in enumerate(rows)
        ]
    if message := broken.close():
        logger.warning(message)
    return [entry for first in places.values() for entry in by_first.get(first, [])]


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
