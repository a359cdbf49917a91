"""A weights file's tensors, from safetensors or torch's zip; nothing in it is run or unpacked.

What a file is, is read from its first bytes, not from its name. safetensors and torch files are both mapped
into memory, so that what a file claims can never take more memory than it has bytes.
"""

from __future__ import annotations

import json
import pickle
import stat
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import LoraError, printable

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_WRAPPERS = ("state_dict", "model", "module", "lora")
_DEEPEST = 4
_MOST_TENSORS = 100_000  # FLUX has 780, and its LoRA of three tensors a layer 1,500
_LONGEST_HEADER = 32_000_000


def load_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors of any shape and dtype by key, header) of one file.

    Raises LoraError whatever is wrong with it.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise LoraError(f"{file} is no regular file (a pipe or device): give a weights file")
        with file.open("rb") as stream:
            start = stream.read(64)
    except (OSError, ValueError) as error:
        if isinstance(error, LoraError):
            raise
        reason = getattr(error, "strerror", None) or "not a file name"
        raise LoraError(
            f"LoRA {short(file)} cannot be opened ({reason}): check it exists and may be read"
        ) from error
    if start.startswith(b"version https://git-lfs"):
        raise LoraError(f"{file} is a Git LFS pointer, not weights: download the file itself (git lfs pull)")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise LoraError(f"{file} is a web page, not weights: download the file again with its direct link")
    try:
        by_name = file.suffix.lower() in (".safetensors", ".sft")
        if start.startswith(b"PK\x03\x04"):
            if by_name:  # torch.load goes by the name
                raise LoraError(f"{file} is a torch file by its content: rename it to {file.stem}.pt")
            return _torch_file(file, status.st_size), {}
        if start.startswith(b"\x80") and not by_name:
            raise ValueError("torch's format from before 2020, whose sizes cannot be checked")
        return _safetensors_file(file)
    except (LoraError, MemoryError):
        raise
    except Exception as error:  # whatever a reader of damaged bytes may raise is the file's fault
        raise LoraError(
            f"{file} is damaged, incomplete or not a weights file ({status.st_size} bytes; "
            f"{_reason(error)}): "
            "download or save it again, as .safetensors"
        ) from error


def _safetensors_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if _LONGEST_HEADER < length < file.stat().st_size:
        raise ValueError(f"a header of {length} bytes is no LoRA's")
    with safe_open(str(file), framework="pt", device="cpu") as opened:
        return _map(file, opened), opened.metadata() or {}


def _map(file: Path, opened) -> dict[str, Tensor]:
    """All tensors as views of one memory map; those of other dtypes or odd offsets are the library's copies.

    safe_open has by now checked the header: offsets lie inside the file and do not overlap.
    """
    # Not safetensors.torch.load_file: 26 ms against its 90 for 1,560 tensors, which `lora_load.py` counts.
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    if not entries:
        return {}
    _check_count(len(entries))
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


def _torch_file(file: Path, size: int) -> dict[str, Tensor]:
    """Tensors of a torch.save zip, mapped."""
    return _unwrap(load_zip(file, size))


def load_zip(file: Path, size: int) -> object:
    """What a torch.save zip of `size` bytes holds, mapped; it takes no more memory than the file has bytes.

    torch.save never packs: a packed entry is no weights file's. Raises whatever damage makes its readers
    raise; ValueError for claims of more than the file has.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries):
        raise ValueError("its entries are compressed, which torch never does")
    if sum(e.file_size for e in entries) > size:
        raise ValueError("its entries claim more bytes than it has")
    # mmap also makes torch check each tensor against the bytes that are there
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _unwrap(loaded: object) -> dict[str, Tensor]:
    for _ in range(_DEEPEST):
        if not isinstance(loaded, dict):
            break
        loaded = next((loaded[n] for n in _WRAPPERS if isinstance(loaded.get(n), dict)), loaded)
    if not isinstance(loaded, dict) or not any(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError("it holds no named tensors")
    _check_count(len(loaded))
    tensors = {}
    for key, value in loaded.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = torch.tensor(float(value))  # an alpha that was no tensor
        if not isinstance(value, Tensor):
            continue
        if not isinstance(key, str):
            raise ValueError(f"a tensor's name is {type(key).__name__}, not text")
        tensors[key] = plain(key, value)
    return tensors


def _check_count(tensors: int) -> None:
    if tensors > _MOST_TENSORS:
        raise ValueError(f"{tensors} tensors are no LoRA's, at most {_MOST_TENSORS} are read")


def plain(key: str, tensor: Tensor) -> Tensor:
    """The tensor as an ordinary one that has as many bytes as it claims. Raises ValueError."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"{key[:80]} is no ordinary tensor")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError(f"{key[:80]} claims more elements than the file holds")
    return tensor


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it holds Python objects, which are never run"
    lines = str(error).splitlines()
    return printable(lines[0])[:120] if lines and lines[0].strip() else type(error).__name__


def short(path: object) -> str:
    """A path for a message: printable, and its end only where it is very long."""
    text = printable(str(path))
    return text if len(text) <= 200 else "..." + text[-200:]
