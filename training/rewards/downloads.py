"""Weights of rewards from the Hugging Face Hub, fetched before a library loads them, so that it can be seen.

Nothing here decides whether a reward works: what cannot be fetched is left to its own loader, whose error
names the remedy (`weights.remedy`).
"""

from __future__ import annotations

import fnmatch
import inspect
import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .weights import is_hub_id, on_disk, places

logger = logging.getLogger(__name__)

Heard = Callable[[int, int, str], None]  # bytes that are here, bytes in all, the repository

SMALL = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations and tokenizers
WEIGHTS = (  # what transformers takes, in its order; one file or shards
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)
SECONDS = 10  # for a repository's listing


def fetch(options: Mapping[str, object], heard: Heard) -> None:
    """Download the models that a reward's options name, as far as they are not on this machine.

    options: with the defaults (`base.check`). Whatever `heard` raises ends it; finished files are kept.
    """
    chosen = places(options)
    for repository in {place for key, place in chosen.items() if key != "tokenizer" and is_hub_id(place)}:
        if complete(on_disk(repository)):
            continue
        stopped: list[Exception] = []
        try:
            _fetch(repository, heard, stopped)
        except (
            Exception
        ) as error:  # offline, a proxy, a gate, a full disk: the loader meets it again and says
            logger.warning("%s was not fetched: %s", repository, error)
        if stopped:
            raise stopped[0]


def complete(folder: Path | None) -> bool:
    """Whether a model's folder holds weights, and every shard that its index names."""
    if folder is None:
        return False
    for kinds in WEIGHTS:
        indices = list(folder.glob(f"{kinds[0]}.index.json"))
        if indices:
            shards = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()
            return all((folder / shard).exists() for shard in shards)
        if (folder / kinds[0]).exists():
            return True
    return False


def wanted(sizes: Mapping[str, int]) -> dict[str, int]:
    """Of a repository's files {name: bytes} those that transformers loads a model from, in either format."""
    own = {name: size for name, size in sizes.items() if "/" not in name}
    kept = {name: size for name, size in own.items() if _matches(name, SMALL)}
    for kinds in WEIGHTS:
        if weights := {name: size for name, size in own.items() if _matches(name, kinds)}:
            return kept | weights
    return kept


def _fetch(repository: str, heard: Heard, stopped: list[Exception]) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    listing = HfApi().model_info(repository, files_metadata=True, timeout=SECONDS).siblings or []
    files = wanted({file.rfilename: file.size or 0 for file in listing})
    total, here, thread = sum(files.values()), 0, threading.get_ident()
    logger.info("downloading %s: %.2f GB", repository, total / 1e9)

    def count(more: float) -> None:
        nonlocal here
        here += int(more)
        try:
            heard(min(here, total), total, repository)
        except Exception as error:
            stopped.append(error)
            if threading.get_ident() == thread:  # an engine's own thread would not pass it on
                raise

    more = {}
    if (
        "tqdm_class" in inspect.signature(hf_hub_download).parameters
    ):  # older ones show bars of their own only
        more = {"tqdm_class": _counting(count)}
    done = 0
    for name, size in files.items():
        hf_hub_download(repository, name, **more)
        done += size
        count(done - here)  # exact, also for what was in the cache
        if stopped:
            return


def _counting(count: Callable[[float], None]) -> type:
    """The hub's own bar on the console, which also tells how many bytes came."""
    from huggingface_hub.utils import tqdm

    class Counting(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            count(n or 0)
            return super().update(n)

    return Counting


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
