"""Where rewards' weights are: looked for before anything is loaded, named when they cannot be loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

PLACES = ("path", "tokenizer", "clip")  # options that name a file, a folder or a hub id
PATTERNS = {"tokenizer": ("tokenizer*", "vocab.json")}
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def device_of(name: str = "") -> torch.device:
    """The named device; "" is this process's own in a training, else the best there is."""
    if name:
        return torch.device(name)
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None and accelerate.PartialState._shared_state:
        return torch.device(accelerate.PartialState().device)
    from ...models.flux import default_device

    return default_device()


def places(options: Mapping[str, object]) -> dict[str, str]:
    """Files, folders and hub ids among a reward's options, its defaults included."""
    return {key: str(options[key]) for key in PLACES if options.get(key)}


def remedy(options: Mapping[str, object]) -> str:
    """What to do about weights that are not there, naming the repositories."""
    ids = [place for place in dict.fromkeys(places(options).values()) if is_hub_id(place)]
    commands = " and ".join(f"hf download {place}" for place in ids)
    return f"get them with {commands}, or give a folder as path" if ids else "give a file or folder as path"


def is_hub_id(place: str) -> bool:
    """Whether it can only be a repository: OWNER/NAME, which is no path here."""
    return not Path(place).exists() and place.count("/") == 1 and place[0] not in "./~\\"


def absent(options: Mapping[str, object]) -> str:
    """What of a reward's weights is neither on this machine nor within reach, in words; "" if nothing.

    Looks only, at most at a repository's listing: whole weights are read when the reward is made.
    """
    for key, place in places(options).items():
        patterns = PATTERNS.get(key, WEIGHTS)
        if not is_hub_id(place):
            if not Path(place).exists():
                return f"{place} does not exist"
            continue
        folder = on_disk(place)
        if folder is not None and any(next(folder.glob(pattern), None) for pattern in patterns):
            continue
        if reason := _out_of_reach(place):
            return f"{place} is not on this machine and cannot be reached ({reason})"
    return ""


def on_disk(place: str) -> Path | None:
    """The folder of a model on this machine: a local one, or a repository's in the hub's cache."""
    from huggingface_hub import snapshot_download

    if Path(place).is_dir():
        return Path(place)
    try:
        return Path(snapshot_download(place, local_files_only=True))
    except Exception:  # absent or no repository's name: both are not in the cache
        return None


def _out_of_reach(repository: str) -> str:
    """Why a repository cannot be downloaded; "" if it can."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(repository, timeout=10)
    except Exception as error:  # offline, a proxy, a wrong name, a gate: the hub has an error for each
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""
