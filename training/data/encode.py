"""Fills the caches of a run's data and lists its rows; killed at any moment, it goes on where it was."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.denoiser import ENCODED_PIXELS
from ..runtime.fingerprints import stamp
from ..runtime.processes import Processes
from .broken import Broken, BrokenSample
from .buckets import BucketBatchSampler
from .cache import image_key, text_key
from .dataset import DROPPED_PROMPT, Batches, Corpus, Entry, Latents, Progress
from .preprocess import Arranged
from .sample import Sample

logger = logging.getLogger(__name__)

LINES = 256  # rows between two flushes of the cache


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
    c, latents = corpora.rows.config, None
    if c.cache:
        folder = Path(c.cache_dir or Path(c.output_dir) / "cache")
        latents = Latents(task, folder)
        rows, samples = _each(corpora, lambda corpus: _encoded(corpus, latents, folder, processes, progress))
        if c.train_text_encoder:
            task.text_to_device()
        else:
            prompts = {e.prompt for e in rows + samples if not e.text} | needed_prompts(c)
            encode_prompts(prompts, task, latents, progress, processes.rank, processes.world)
            processes.wait()
            latents.texts.refresh()
        if c.cache_in_memory:
            latents.memory = {}
    else:
        task.text_to_device()
        rows, samples = _each(corpora, list_corpus)
    batches = Batches(rows, task, latents, corpora.rows)
    order = (c.batch_size, c.seed, processes.rank, processes.world)
    data = PreparedData(
        batches,
        Batches(samples[: c.held_out_rows], task, latents, corpora.samples),
        batches.sampler(*order, prior=False),
        batches.sampler(*order, prior=True),
        corpora.rows.arranger.template,
        tuple(filter(None, [corpora.rows.arranger.report()])),
    )
    if data.class_sampler is not None and len({e.bucket for e in rows}) > 1:
        raise ValueError("prior preservation needs images of one size: set sizing: squash")
    return data


def _each(corpora: Corpora, entries: Callable[[Corpus], list[Entry]]) -> tuple[list[Entry], list[Entry]]:
    """The entries of both, made once where they are one."""
    rows = entries(corpora.rows)
    return rows, rows if corpora.samples is corpora.rows else entries(corpora.samples)


def needed_prompts(config: Any) -> set[str]:
    """The prompts that a run needs beside those of its rows."""
    dropped = {DROPPED_PROMPT} if config.prompt_drop else set()
    return dropped | ({""} if config.task == "sd_inpaint" else set())  # of classifier-free guidance


def _encoded(
    corpus: Corpus, latents: Latents, folder: Path, processes: Processes, progress: Progress
) -> list[Entry]:
    encode_corpus(corpus, latents.task, latents, folder, progress, processes.rank, processes.world)
    processes.wait()
    return read_entries(corpus, latents, folder)


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
    looked: list[bool] = []  # whether there is room for the rest

    def encode(group: list[tuple[Entry, Arranged]]) -> None:
        batch = latents.cast(task.encode_images([item for _, item in group]))
        for i, (entry, _) in enumerate(group):
            latents.pictures.put(entry.key, {name: t[i] for name, t in batch.items()})
            done[entry.index].append(entry)
        if not looked:
            looked.append(True)
            latents.pictures.check_room(len(todo) * max(wanted.values()) - len(group))
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
        for index in progress(todo, "caching images"):
            try:
                rows = corpus.read(index)
            except BrokenSample as error:
                broken.record(error)
                continue
            if isinstance(rows, Sample):
                task.check_widths(rows)
                diptych = corpus.arranger.is_diptych(rows)
                done[index], wanted[index] = [_keep_precomputed(rows, index, latents, diptych)], 1
                continue
            done[index], wanted[index] = [], len(rows)
            for variant, item in enumerate(rows):
                key = image_key(item.encoded_parts[0], latents.picture_print, *item.encoded_parts[1:])
                entry = _entry(index, variant, key, item)
                if key in latents.pictures:
                    done[index].append(entry)
                    continue
                group = waiting.setdefault((item.size, item.reference is None), [])
                group.append((entry, item))
                if len(group) >= min(corpus.config.encode_batch, ENCODED_PIXELS // math.prod(item.size)):
                    encode(group)
            if len(done) >= LINES:
                write()
        for group in waiting.values():
            if group:
                encode(group)
    finally:  # an interrupted run keeps what it has encoded
        write()
    for message in (broken.close(), corpus.arranger.report()):
        if message:
            logger.warning(message)


def _entry(index: int, variant: int, key: str, item: Arranged) -> Entry:
    return Entry(
        index, variant, key, item.prompt, item.size, item.weight, item.prior, item.diptych, item.target
    )


def _keep_precomputed(sample: Sample, index: int, latents: Latents, diptych: bool) -> Entry:
    ready = sample.encoded
    mask = ready.mask[None]
    hard = mask.round() == mask
    parts = {"masked_latents": ready.masked_latents, "mask": mask.to(torch.uint8) if hard.all() else mask}
    text = {"tokens": ready.prompt_embed, "pooled": ready.pooled_prompt_embeds}
    if ready.latents is not None:
        parts["latents"] = ready.latents
    key = image_key(ready.masked_latents, latents.picture_print, *list(parts.values())[1:])
    words = image_key(ready.prompt_embed, f"text {latents.dtype}", ready.pooled_prompt_embeds, ready.text_ids)
    latents.pictures.put(key, latents.cast(parts))
    places = {"text_ids": ready.text_ids.float()} if ready.text_ids.any() else {}  # bfloat16 cannot count
    latents.texts.put(words, latents.cast(text) | places)
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


def read_entries(corpus: Corpus, latents: Latents, folder: Path) -> list[Entry]:
    """All rows noted by all processes whose latents are cached, in row order: the same on every process."""
    latents.pictures.refresh()
    listing = folder / f"rows-{stamp(corpus.stamp, latents.picture_print)}"
    found: dict[tuple[int, int], Entry] = {}
    for path in sorted(listing.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                item = json.loads(line)
                entry = Entry(**{**item, "size": tuple(item["size"])})
            except (ValueError, TypeError, KeyError):
                continue  # the last line of a killed run, or one of another version: encoded again
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
    if missing:
        task.text_to_device()

    @torch.no_grad()
    def encode(some: list[str]) -> list[dict[str, Tensor]]:
        batch = latents.cast(task.encode_text(some))
        return [{name: t[i] for name, t in batch.items()} for i in range(len(some))]

    latents.texts.fill(
        [(text_key(p, latents.text_print), p) for p in missing[rank::world]],
        encode,
        batch_size=task.config.encode_batch,
        wrap=lambda starts: progress(starts, "caching prompts"),
    )


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
        by_first[index] = [_entry(index, v, image_key(r.pixels, ""), r) for v, r in enumerate(rows)]
    for message in (broken.close(), corpus.arranger.report()):
        if message:
            logger.warning(message)
    return [entry for first in places.values() for entry in by_first.get(first, [])]
