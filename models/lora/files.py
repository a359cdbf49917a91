"""From a path to tensors: finds the weights file and the JSON files that belong to it.

Knows nothing of LoRA naming (`names.py`, `parse.py`) nor of file formats (`containers.py`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .containers import load_file, short
from .errors import LoraError

# In order of preference inside a folder; the first three are what peft, diffusers and DanceGRPO write.
WEIGHT_FILES = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)
# A trainer's JSON and the weights it writes it with: beside another file it speaks of another LoRA.
SIDECARS = {"adapter_config.json": "adapter_model", "lora_config.json": "pytorch_lora_weights"}
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_SUBFOLDERS = ("lora", "transformer", "unet")
SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")
_LONGEST_JSON = 10_000_000


def with_strength(text: str, strength: float = 1.0) -> tuple[str, float]:
    """PATH or PATH:STRENGTH, as people write LoRAs, to both. A path that exists is taken whole (C:\\...).

    Raises LoraError when the strength is not finite.
    """
    path, colon, number = text.rpartition(":")
    if colon and not exists(text):
        try:
            path, strength = path, float(number)
        except ValueError:
            return text, strength
        if not math.isfinite(strength):
            raise LoraError(f"the strength of LoRA {short(path)} is {number}: it must be a finite number")
        return path, strength
    return text, strength


def exists(path: str | Path) -> bool:
    """Whether something is there; False for what can be no name at all."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


@dataclass(frozen=True, eq=False)
class RawFile:
    """What lies on disk: tensors by key, the safetensors header, and the JSON objects that belong to them."""

    path: Path
    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]
    sidecars: Mapping[str, dict] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name people know it by: a folder's own when the file's is the same for everyone."""
        generic = self.path.name in WEIGHT_FILES
        return self.path.parent.name if generic else self.path.name

    @property
    def step(self) -> int | None:
        """The training step in `checkpoint-300-0`, `lora-checkpoint-300-0`, `checkpoint-ema-300-0`."""
        for part in reversed(self.path.parts[-4:]):
            if match := re.search(r"checkpoint-(?:ema-)?([0-9]{1,12})", part):
                return int(match[1])
        return None


def load(path: str | Path) -> RawFile:
    """Reads a weights file or a folder holding one. Tensors are memory-mapped.

    Raises LoraError when nothing is there, when it is ambiguous, or when the file is damaged.
    """
    path = Path(path)
    if not exists(path):
        raise LoraError(f"LoRA {short(path)} does not exist: check the path, or refresh the list of models")
    files = _find(path) if path.is_dir() else [path]
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for file in files:
        part, head = load_file(file)
        tensors.update(part)
        header.update(head)
    return RawFile(files[0], tensors, header, _sidecars(files[0], alone=path.is_dir()))


def sidecar_files(weights: Path, *, alone: bool = False) -> list[Path]:
    """The JSON files that would belong to these weights, there or not, the most trusted first.

    alone: the weights were given as their folder, so what else is in it is theirs.
    """
    names = [n for n, stem in SIDECARS.items() if alone or weights.stem == stem]
    return [*(weights.with_name(n) for n in names), weights.with_suffix(".json")]


def _sidecars(weights: Path, *, alone: bool) -> dict[str, dict]:
    generic = weights.name in WEIGHT_FILES
    found = {}
    for file in sidecar_files(weights, alone=alone and not generic):
        if file.name in SIDECARS:
            content = _read_json(file)
        else:  # <name>.json may be any program's: previews, notes
            try:
                content = _read_json(file)
            except LoraError:
                continue
            if content is not None and not {"lora_alpha", "network_alpha", "lora_params", "peft_type"} & set(
                content
            ):
                continue
        if content is not None:
            found[file.name] = content
    return found


def _find(folder: Path) -> list[Path]:
    for place in (folder, *(folder / sub for sub in _SUBFOLDERS)):
        for name in WEIGHT_FILES:
            if (place / name).is_file():
                return [place / name]
        if (place / _INDEX).is_file():
            return _shards(place / _INDEX)
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    found = [p for p in files if p.suffix.lower() in SUFFIXES[:2]]
    found = found or [p for p in files if p.suffix.lower() in SUFFIXES]
    if len(found) != 1:
        listing = ", ".join(p.name for p in found[:4]) or "none"
        raise LoraError(
            f"folder {folder} should hold one LoRA but its .safetensors files are: {listing}; "
            f"name the file itself, or a folder with one of {', '.join(WEIGHT_FILES[:2])}"
        )
    return found


def _shards(index: Path) -> list[Path]:
    names = (_read_json(index) or {}).get("weight_map")
    names = set(names.values()) if isinstance(names, dict) and names else {None}
    if not all(isinstance(n, str) and Path(n).name == n and n for n in names):
        raise LoraError(f"{index} names no weights files beside it: download the folder again")
    return [index.with_name(name) for name in sorted(names)]


def _read_json(file: Path) -> dict | None:
    try:
        if not file.is_file():
            return None
        if file.stat().st_size > _LONGEST_JSON:
            raise ValueError(f"over {_LONGEST_JSON} bytes")
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise LoraError(f"{file} is not readable JSON ({error}): repair it, or remove it") from error
    if not isinstance(value, dict):
        raise LoraError(f"{file} is not a JSON object: repair it, or remove it")
    return value
