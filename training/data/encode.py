"""From preprocessed rows to latents and embeddings in the caches, and the list of what is there.

Killed at any moment, it goes on where it was: what is listed and cached is not read again.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.denoiser import ENCODED_PIXELS
from ..runtime.fingerprints import stamp
from ..runtime.processes import Processes, Progress
from .cache import ContentCache, fingerprint, image_key, text_key
from .preprocess import Corpus, Preprocessed
from .sample import Broken, BrokenSample, Sample

logger = logging.getLogger(__name__)

LINES = 256  # rows between two flushes of the cache


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


class Caches:
    """The image and text caches of one task's encoders, under `folder`.

    The folders are called `pictures` and `texts`, as earlier versions wrote them.
    """

    def __init__(self, task: Any, folder: Path):
        config = task.config
        self.dtype = getattr(torch, config.cache_dtype)
        how = ("sample" if config.vae_sample else "mode", config.cache_dtype, task.name)
        self.task, self.folder = task, folder
        self.image_print = fingerprint(*filter(None, [task.vae]), *how)
        self.images = ContentCache(folder / "pictures")
        self.texts = ContentCache(folder / "texts")
        self.memory: dict[str, dict[str, Tensor]] | None = None

    @cached_property
    def text_print(self) -> str:
        """Of the text encoders; for a hub id they are loaded for it, so not before a prompt is encoded."""
        return self.task.text_fingerprint()

    def cast(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Floats in the type that is stored, `cache_dtype`; masks of integers as they are."""
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in tensors.items()}

    def text(self, prompt: str) -> dict[str, Tensor]:
        """What `encode_text` gives of one prompt, without batch axis; KeyError where it is not cached."""
        return self.text_at(text_key(prompt, self.text_print))

    def text_at(self, key: str) -> dict[str, Tensor]:
        """The same of an entry that brought its text encoded."""
        return self._get(self.texts, key)

    def image(self, key: str) -> dict[str, Tensor]:
        """What `encode_images` gives of an entry, without batch axis; KeyError where it is not cached."""
        return self._get(self.images, key)

    def _get(self, cache: ContentCache, key: str) -> dict[str, Tensor]:
        if self.memory is None:
            return cache.get(key)
        if key not in self.memory:
            self.memory[key] = cache.get(key)
        return self.memory[key]


def encode_corpus(corpus: Corpus, caches: Caches, processes: Processes, progress: Progress) -> list[Entry]:
    """Encode what is missing of the rows, each process its share; returns the entries of all of them.

    Raises ValueError with the list when more than 5 % of the rows are broken, or when the disk is full.
    """
    places = sorted(set(corpus.places().values()))
    listed = {entry.index for entry in read_entries(corpus, caches)}
    todo = [i for i in places[processes.rank :: processes.world] if i not in listed]
    broken = Broken(max(1, len(places) // processes.world))
    listing = _listing(corpus, caches) / f"{processes.rank:03d}.jsonl"
    encoding = _Encoding(caches, corpus.config.encode_batch, listing, len(todo))
    try:
        for index, rows in _readable(corpus, progress(todo, "caching images"), broken):
            if isinstance(rows, Sample):
                encoding.add_precomputed(index, rows, corpus.preprocessor.is_diptych(rows))
            else:
                encoding.add(index, rows)
        encoding.finish()
    finally:  # an interrupted run keeps what it has encoded
        encoding.write()
    _warn(broken.close(), corpus.preprocessor.report())
    processes.wait()
    return read_entries(corpus, caches)


class _Encoding:
    """Rows on their way into the cache: gathered by size, encoded in batches, listed when they are whole."""

    def __init__(self, caches: Caches, batch: int, listing: Path, rows: int):
        """batch: most images of one call of the VAE. listing: the file of finished rows. rows: to come."""
        self.caches, self.batch, self.listing, self.rows = caches, batch, listing, rows
        self.waiting: dict[tuple, list[tuple[Entry, Preprocessed]]] = defaultdict(list)
        self.done: dict[int, list[Entry]] = {}  # entries of each row under way that are in the cache
        self.wanted: dict[int, int] = {}  # variants of each row under way
        self.room_checked = False

    def add(self, index: int, rows: list[Preprocessed]) -> None:
        """All variants of one row."""
        self.done[index], self.wanted[index] = [], len(rows)
        for variant, item in enumerate(rows):
            key = image_key(item.encoded_parts[0], self.caches.image_print, *item.encoded_parts[1:])
            entry = _entry(index, variant, key, item)
            if key in self.caches.images:
                self.done[index].append(entry)
                continue
            group = self.waiting[item.size, item.reference is None]
            group.append((entry, item))
            if len(group) >= min(self.batch, ENCODED_PIXELS // math.prod(item.size)):
                self._encode(group)
        self._write_some()

    def add_precomputed(self, index: int, sample: Sample, diptych: bool) -> None:
        """A row whose tensors are there."""
        self.caches.task.check_widths(sample)
        self.done[index], self.wanted[index] = [_keep_precomputed(sample, index, self.caches, diptych)], 1
        self._write_some()

    def finish(self) -> None:
        """Encode what still waits for others of its size."""
        for group in self.waiting.values():
            if group:
                self._encode(group)

    def _encode(self, group: list[tuple[Entry, Preprocessed]]) -> None:
        images = self.caches.images
        batch = self.caches.cast(self.caches.task.encode_images([item for _, item in group]))
        for i, (entry, _) in enumerate(group):
            images.put(entry.key, {name: tensor[i] for name, tensor in batch.items()})
            self.done[entry.index].append(entry)
        if not self.room_checked:
            self.room_checked = True
            images.check_room(self.rows * max(self.wanted.values()) - len(group))
        group.clear()

    def _write_some(self) -> None:
        if len(self.done) >= LINES:
            self.write()

    def write(self) -> None:
        """Flush the cache, and list the rows that are whole."""
        # Images first: a line must never name latents that are not on disk.
        self.caches.images.flush()
        self.caches.texts.flush()
        whole = [index for index, entries in self.done.items() if len(entries) == self.wanted[index]]
        self.listing.parent.mkdir(parents=True, exist_ok=True)
        with open(self.listing, "a", encoding="utf-8") as file:
            for index in whole:
                file.writelines(json.dumps(asdict(entry)) + "\n" for entry in self.done.pop(index))


def _warn(*messages: str) -> None:
    for message in filter(None, messages):
        logger.warning(message)


def _entry(index: int, variant: int, key: str, item: Preprocessed) -> Entry:
    return Entry(
        index, variant, key, item.prompt, item.size, item.weight, item.prior, item.diptych, item.target
    )


def _keep_precomputed(sample: Sample, index: int, caches: Caches, diptych: bool) -> Entry:
    ready = sample.encoded
    mask = ready.mask[None]
    hard = mask.round() == mask
    parts = {"masked_latents": ready.masked_latents, "mask": mask.to(torch.uint8) if hard.all() else mask}
    text = {"tokens": ready.prompt_embed, "pooled": ready.pooled_prompt_embeds}
    if ready.latents is not None:
        parts["latents"] = ready.latents
    key = image_key(ready.masked_latents, caches.image_print, *list(parts.values())[1:])
    words = image_key(ready.prompt_embed, f"text {caches.dtype}", ready.pooled_prompt_embeds, ready.text_ids)
    caches.images.put(key, caches.cast(parts))
    places = {"text_ids": ready.text_ids.float()} if ready.text_ids.any() else {}  # bfloat16 cannot count
    caches.texts.put(words, caches.cast(text) | places)
    return Entry(
        index,
        0,
        key,
        sample.prompt,
        tuple(mask.shape[-2:]),
        sample.weight,
        diptych=diptych,
        target=ready.latents is not None,
        text=words,
        tokens=len(ready.prompt_embed),
        ids=stamp(ready.text_ids.tolist()) if places else "",
    )


def _listing(corpus: Corpus, caches: Caches) -> Path:
    """The folder of the lists of finished rows, one list by each process."""
    return caches.folder / f"rows-{stamp(corpus.stamp, caches.image_print)}"


def read_entries(corpus: Corpus, caches: Caches) -> list[Entry]:
    """All rows noted by all processes whose latents are cached, in row order: the same on every process."""
    caches.images.refresh()
    found: dict[tuple[int, int], Entry] = {}
    for path in sorted(_listing(corpus, caches).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                item = json.loads(line)
                entry = Entry(**{**item, "size": tuple(item["size"])})
            except (ValueError, TypeError, KeyError):
                continue  # the last line of a killed run, or one of another version: encoded again
            if entry.key in caches.images:
                found[(entry.index, entry.variant)] = entry
    by_first: dict[int, list[Entry]] = {}
    for entry in (found[place] for place in sorted(found)):
        by_first.setdefault(entry.index, []).append(entry)
    return [entry for first in corpus.places().values() for entry in by_first.get(first, [])]


def encode_prompts(prompts: Iterable[str], caches: Caches, processes: Processes, progress: Progress) -> None:
    """Encode the prompts that are not cached yet, each process its share."""
    keys = {text_key(prompt, caches.text_print): prompt for prompt in sorted(set(prompts))}
    missing = [(key, prompt) for key, prompt in keys.items() if key not in caches.texts]
    if missing:
        caches.task.text_to_device()

    @torch.no_grad()
    def encode(some: list[str]) -> list[dict[str, Tensor]]:
        batch = caches.cast(caches.task.encode_text(some))
        return [{name: t[i] for name, t in batch.items()} for i in range(len(some))]

    caches.texts.fill(
        missing[processes.rank :: processes.world],
        encode,
        batch_size=caches.task.config.encode_batch,
        wrap=lambda starts: progress(starts, "caching prompts"),
    )
    processes.wait()
    caches.texts.refresh()


def _readable(corpus: Corpus, indices: Iterable[int], broken: Broken) -> Iterator[tuple[int, Any]]:
    """(index, what `corpus.read` gives) of these rows; those that cannot be read are recorded in `broken`."""
    for index in indices:
        try:
            rows = corpus.read(index)
        except BrokenSample as error:
            broken.record(error)
            continue
        yield index, rows


def list_corpus(corpus: Corpus) -> list[Entry]:
    """Entries of all readable rows without encoding anything, for training without a cache."""
    places = corpus.places()
    broken = Broken(len(set(places.values())))
    by_first: dict[int, list[Entry]] = {}
    for index, rows in _readable(corpus, sorted(set(places.values())), broken):
        if isinstance(rows, Sample):
            raise ValueError("cache is off but the data is precomputed: set cache: true")
        by_first[index] = [_entry(index, v, image_key(r.pixels, ""), r) for v, r in enumerate(rows)]
    _warn(broken.close(), corpus.preprocessor.report())
    return [entry for first in places.values() for entry in by_first.get(first, [])]
