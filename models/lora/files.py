"""From a path to tensors: finds the weights file, its JSON neighbours and its header; safe formats only.

Knows nothing of LoRA naming (`names.py`, `parse.py`). Nothing here executes a file: safetensors, or
torch.load(weights_only=True).
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .weights import LoraError

SIDECARS = ("adapter_config.json", "lora_config.json")
# In order of preference inside a folder; the first three are what peft, diffusers and DanceGRPO write.
WEIGHT_FILES = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_SUBFOLDERS = ("lora", "transformer", "unet")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def with_strength(text: str, strength: float = 1.0) -> tuple[str, float]:
    """PATH or PATH:STRENGTH, as people write LoRAs, to both. A path that exists is taken whole (C:\\...)."""
    path, colon, number = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            return path, float(number)
        except ValueError:
            pass
    return text, strength


@dataclass(frozen=True, eq=False)
class RawFile:
    """What lies on disk: tensors by key, the safetensors header, and the JSON files beside them."""

    path: Path
    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]
    adapter_config: dict | None = None
    lora_config: dict | None = None

    @property
    def name(self) -> str:
        """The name people know it by: a folder's own when the file's is the same for everyone."""
        generic = self.path.name in WEIGHT_FILES
        return self.path.parent.name if generic else self.path.name

    @property
    def step(self) -> int | None:
        """The training step in `checkpoint-300-0`, `lora-checkpoint-300-0`, `checkpoint-ema-300-0`."""
        for part in reversed(self.path.parts[-4:]):
            if match := re.search(r"checkpoint-(?:ema-)?(\d+)", part):
                return int(match[1])
        return None


def load(path: str | Path) -> RawFile:
    """Reads a weights file or a folder holding one. Tensors of safetensors are memory-mapped.

    Raises LoraError when nothing is there, when it is ambiguous, or when the file is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise LoraError(f"LoRA {path} does not exist: check the path, or refresh the list of models")
    files = _find(path) if path.is_dir() else [path]
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for file in files:
        part, head = _load_file(file)
        tensors.update(part)
        header.update(head)
    folder = files[0].parent
    adapter, dance = (_read_json(folder / name) for name in SIDECARS)
    return RawFile(files[0], tensors, header, adapter, dance)


def _find(folder: Path) -> list[Path]:
    for place in (folder, *(folder / sub for sub in _SUBFOLDERS)):
        for name in WEIGHT_FILES:
            if (place / name).is_file():
                return [place / name]
        if (place / _INDEX).is_file():
            shards = set((_read_json(place / _INDEX) or {}).get("weight_map", {}).values())
            return [place / name for name in sorted(shards)]
    found = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if len(found) != 1:
        listing = ", ".join(p.name for p in found[:4]) or "none"
        raise LoraError(
            f"folder {folder} should hold one LoRA but its .safetensors files are: {listing}; "
            f"name the file itself, or a folder with one of {', '.join(WEIGHT_FILES[:2])}"
        )
    return found


def _load_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise LoraError(
            f"LoRA {file} cannot be opened ({error.strerror}): check it exists and may be read"
        ) from error
    if start.startswith(b"version https://git-lfs"):
        raise LoraError(f"{file} is a Git LFS pointer, not weights: download the file itself (git lfs pull)")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise LoraError(f"{file} is a web page, not weights: download the file again with its direct link")
    try:
        if file.suffix in (".safetensors", ".sft"):
            with safe_open(str(file), framework="pt", device="cpu") as opened:
                return _map(file, opened), opened.metadata() or {}
        return _unwrap(torch.load(file, map_location="cpu", weights_only=True)), {}
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        size = file.stat().st_size
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise LoraError(
            f"{file} is damaged, incomplete or not a weights file ({size} bytes; {reason}): "
            "download or save it again"
        ) from error


def _map(file: Path, opened) -> dict[str, Tensor]:
    """All tensors as views of one memory map: a sixth of the time of asking for them one by one.

    safe_open has by now checked the header: offsets lie inside the file and do not overlap.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    if not entries:
        return {}
    data = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)[8 + length :]
    tensors = {}
    for key, entry in entries.items():
        start, stop = entry["data_offsets"]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None or (8 + length + start) % dtype.itemsize or start == stop:
            tensors[key] = opened.get_tensor(key)
        else:
            tensors[key] = data[start:stop].view(dtype).view(entry["shape"])
    return tensors


def _unwrap(loaded: object) -> dict[str, Tensor]:
    while isinstance(loaded, dict) and "state_dict" in loaded:
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not any(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError("it holds no named tensors")
    return {k: v for k, v in loaded.items() if isinstance(v, Tensor)}


def _read_json(file: Path) -> dict | None:
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LoraError(f"{file} is not readable JSON ({error}): repair it, or remove it") from error
    return value if isinstance(value, dict) else None


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises LoraError naming the first tensor that holds NaN or infinity."""
    kept = {k: t for k, t in tensors.items() if t.is_floating_point() and t.numel()}
    # A sum is not finite if one element is not: one pass, no temporary. (Asking for a float32 result would be
    # nine times slower.) A sum that overflows float16 only leads to the slow check below.
    if all(_sum(run).isfinite() for run in _runs(kept.values())):
        return
    for key, tensor in kept.items():
        bad = int((~tensor.float().isfinite()).sum())
        if bad:
            raise LoraError(
                f"{name} holds NaN or infinite values ({key}: {bad} of {tensor.numel()}): "
                "its training diverged, use an earlier checkpoint"
            )


def _runs(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same elements in as few tensors as possible: those that fill one stretch of a file become one."""
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype), []).append(tensor)
    runs = []
    for group in groups.values():
        start = min(t.storage_offset() for t in group)
        size = max(t.storage_offset() + t.numel() for t in group) - start
        filled = size == sum(t.numel() for t in group) and all(t.is_contiguous() for t in group)
        runs.extend([group[0].as_strided((size,), (1,), start)] if filled else group)
    return runs


def _sum(tensor: Tensor) -> Tensor:
    if tensor.dtype.itemsize < 2:  # float8 has no sum
        tensor = tensor.float()
    return tensor.sum()
