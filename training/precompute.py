"""Images to Flux Fill conditions on disk, in the format that `data/precomputed.py` reads.

So reward training can run where neither the images nor the text encoders are. Masks are kept at latent size:
a cell is repainted where any of its pixels is, and the masked image is encoded with that same mask.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.denoiser import ENCODED_PIXELS
from ..models.flux import default_device
from ..models.packing import VAE_FACTOR
from .config import TrainConfig
from .data.cache import fingerprint
from .data.precomputed import index_row, is_written, read_index, write_index, write_row
from .data.preprocess import Corpus, Preprocessed
from .data.sample import Broken, BrokenSample, Sample
from .runtime.disk import check_folder, check_room, write_whole
from .runtime.fingerprints import stamp
from .runtime.processes import Progress, silent
from .tasks.families import make_task

logger = logging.getLogger(__name__)

NOTE = "precompute.json"  # beside the index: what the folder was made of
Row = tuple[str, Preprocessed]  # with its file name


def precompute(
    config: TrainConfig,
    folder: Path,
    *,
    targets: bool = False,
    device: torch.device | str | None = None,
    progress: Progress = silent,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Encode every example of the configuration's data once; returns the index file.

    targets: write the latents of target images too, where rows have one, for supervised training.
    should_stop: asked after every group of rows. What is there already is kept, so an interrupted run goes
    on; however it ends, the index lists what is complete. Raises ValueError for a configuration or data that
    cannot be written so, a folder that holds something else, and a disk without room.
    """
    _check(config, folder)
    task = make_task(config, device or default_device())
    task.load_encoders()
    corpus = Corpus(config, task.default_template)
    dtype = getattr(torch, config.cache_dtype)
    facts = (corpus.stamp, fingerprint(task.vae), task.text_fingerprint(), config.cache_dtype, targets)
    _claim(folder, stamp(*facts))
    listed = {row["text_ids"]: row for row in read_index(folder)}  # by file name
    room_checked = False
    try:
        for group in _groups(corpus, config, targets, folder, listed, progress):
            encoded = _encode(task, [item for _, item in group], targets and group[0][1].target)
            rows = [{name: value.to(dtype) for name, value in parts.items()} for parts in encoded]
            if not room_checked:
                needed = sum(value.nbytes for value in rows[0].values()) * _missing(corpus, folder, listed)
                check_room(folder, needed, f"output {folder}")
                room_checked = True
            for (file, _), parts in zip(group, rows, strict=True):
                write_row(folder, file, parts)
            if should_stop():
                break
    finally:
        complete = [listed[file] for file in sorted(listed, key=_place) if _is_complete(folder, listed[file])]
        index = write_index(folder, complete) if complete else folder / "index.json"
    return index


def _check(config: TrainConfig, folder: Path) -> None:
    if config.task != "fill":
        raise ValueError(f"task is {config.task!r}: the precomputed format is FLUX Fill's, set task=fill")
    if config.text_lengths or config.class_images or config.edit_loss_weight:
        raise ValueError("text_lengths, class_images and edit_loss_weight need images: leave them out")
    check_folder(folder)
    if (folder / "index.json").exists() and not (folder / NOTE).is_file():
        raise ValueError(f"output {folder} holds an index.json of another origin: name an empty folder")


def _claim(folder: Path, facts: str) -> None:
    """Note in the folder what it is made of, or raise ValueError if that is something else."""
    note, text = folder / NOTE, json.dumps({"made_of": facts}) + "\n"
    if note.is_file():
        if note.read_text(encoding="utf-8", errors="replace") != text:
            raise ValueError(
                f"output {folder} holds rows of other data, options or weights: name an empty folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(note, lambda partial: partial.write_text(text, encoding="utf-8"))


def _place(file: str) -> list[int]:
    """Number of the example and of its mask in a file name of ours."""
    return [int(number) for number in re.findall(r"\d+", file)]


def _is_complete(folder: Path, row: dict[str, Any]) -> bool:
    return is_written(folder, row["text_ids"], "latents_path" in row)


def _missing(corpus: Corpus, folder: Path, listed: dict[str, dict[str, Any]]) -> int:
    """About how many rows are still to be written."""
    files = {f"fill_{index}.pt" for index in corpus.places().values()}
    return sum(file not in listed or not _is_complete(folder, listed[file]) for file in files)


def _groups(
    corpus: Corpus, config: TrainConfig, targets: bool, folder: Path, listed: dict, progress: Progress
) -> Iterator[list[Row]]:
    """Rows of one size that are not written yet; all of them are put into `listed`, in the data's order."""
    places = sorted(set(corpus.places().values()))
    broken, waiting = Broken(len(places)), {}
    for index in progress(places, "encoding"):
        try:
            sample = corpus.source[index]
            rows = corpus.preprocess(sample)
        except BrokenSample as error:
            broken.record(error)
            continue
        if isinstance(rows, Sample) or sample.prior:
            raise ValueError(f"{sample.name} is precomputed already, or a class image: leave it out")
        for variant, item in enumerate(rows):
            file = f"fill_{index}_{variant}.pt" if variant else f"fill_{index}.pt"
            has = {"latents": targets and item.target, "edit_mask": _edit_mask(item) is not None}
            listed[file] = index_row(sample.prompt, file, [part for part, there in has.items() if there])
            listed[file]["layout"] = "diptych" if item.diptych else "inpaint"
            if item.weight != 1:
                listed[file]["weight"] = item.weight
            if _is_complete(folder, listed[file]):
                continue
            group = waiting.setdefault((item.size, item.target), [])
            group.append((file, item))
            if len(group) >= min(config.encode_batch, max(1, ENCODED_PIXELS // math.prod(item.size))):
                yield waiting.pop((item.size, item.target))
    yield from waiting.values()
    if message := broken.close():
        logger.warning(message)


@torch.no_grad()
def _encode(task: Any, items: list[Preprocessed], targets: bool) -> list[dict[str, Tensor]]:
    """One dictionary of the format's tensors per item."""
    task.text_to_device()
    pixels = torch.stack([item.pixels for item in items])
    cells = nn.functional.max_pool2d(torch.stack([item.mask for item in items]), VAE_FACTOR)
    mask = cells.repeat_interleave(VAE_FACTOR, -2).repeat_interleave(VAE_FACTOR, -1)
    text = task.encode_text([item.prompt for item in items])
    columns = {
        "prompt_embed": text["tokens"],
        "pooled_prompt_embeds": text["pooled"],
        "text_ids": torch.zeros(*text["tokens"].shape[:2], 3),
        "masked_latents": task.latents(pixels * (1 - mask)),
        "mask_latents": cells,
    }
    if targets:
        columns["latents"] = task.latents(pixels)
    rows = [{name: column[i] for name, column in columns.items()} for i in range(len(items))]
    masks = [_edit_mask(item) for item in items]
    return [
        row if mask is None else {"edit_mask": mask, **row} for row, mask in zip(rows, masks, strict=True)
    ]


def _edit_mask(item: Preprocessed) -> Tensor | None:
    """A diptych row's own mask of what changes, [1,H/8,W/8] over both panels; None where it has none."""
    if not item.diptych or item.edited is None:
        return None
    panel = nn.functional.max_pool2d(item.edited[None], VAE_FACTOR)
    return nn.functional.pad(panel, (panel.shape[-1], 0))
