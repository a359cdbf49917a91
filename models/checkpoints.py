"""Stable Diffusion's single-file checkpoints as plain state dicts: reading, writing, cutting apart.

Only tensors are read: safetensors, or pickles under weights_only. Diffusers folders are loaded elsewhere.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DENOISER = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
PICKLES = (".ckpt", ".pt", ".pth")
SUFFIXES = (*PICKLES, ".safetensors")

DTYPES = {  # as safetensors names them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

State = dict[str, Tensor]


def read(path: str | Path) -> State:
    """The tensors of a file, a `state_dict` inside unpacked. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist: check the path")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"checkpoint {path} has an unknown suffix: give one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            mapped = zipfile.is_zipfile(path)  # torch's older format cannot be
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # each reader has exceptions of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"checkpoint {path} cannot be read safely ({reason}): use a safetensors version of it"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"checkpoint {path} holds no tensors: give a model's file")
    return tensors


class Opened:
    """A file's tensors read one at a time, and described without being read."""

    def __init__(self, path: Path, tensors: State | None = None, lazy: Any = None):
        self.path, self._tensors, self._lazy = path, tensors, lazy
        self._names = set(lazy.keys() if tensors is None else tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._names)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor."""
        if self._tensors is not None:
            tensor = self._tensors[name]
            return tuple(tensor.shape), tensor.dtype
        part = self._lazy.get_slice(name)
        return tuple(part.get_shape()), DTYPES[part.get_dtype()]

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._lazy.get_tensor(name) if self._tensors is None else self._tensors[name]


@contextmanager
def opened(path: str | Path) -> Iterator[Opened]:
    """A file to be read tensor by tensor; pickles are mapped, not loaded. Raises as `read` does."""
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        yield Opened(path, read(path))
        return
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist: check the path")
    from safetensors import SafetensorError, safe_open

    try:
        lazy = safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path} cannot be read ({error}): download it again") from error
    with lazy as tensors:
        yield Opened(path, lazy=tensors)


def stream(
    path: Path,
    plan: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensor: Callable[[int, str], Tensor],
) -> None:
    """Write safetensors of planned shapes and dtypes; tensor(index, name) is asked for one after another.

    The format: 8 bytes with the header's length, the header in JSON, the tensors' bytes.
    """
    order = sorted(plan, key=lambda name: (-plan[name][1].itemsize, name))  # each starts at its own alignment
    header, at = {}, 0
    for name in order:
        shape, dtype = plan[name]
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, name in enumerate(order):
            value = tensor(index, name).contiguous()
            file.write(value.flatten().view(torch.uint8).numpy().data)


def write(path: Path, state: State, *, wrapped: bool = False) -> None:
    """Write by suffix; `wrapped` puts a pickle's tensors under `state_dict`, as full checkpoints have it."""
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save({"state_dict": state} if wrapped else state, path)


def part(state: State, prefix: str) -> State:
    """The entries under a prefix, without it. Raises ValueError if there are none."""
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"the checkpoint has nothing under {prefix}: give a full Stable Diffusion 1.x one")
    return found


def with_part(state: State, prefix: str, new: State) -> State:
    """The checkpoint with the entries under a prefix replaced by `new`.

    Raises ValueError unless both name the same ones.
    """
    old = part(state, prefix)
    for names, what in ((old.keys() - new.keys(), "lacks"), (new.keys() - old.keys(), "has")):
        if names:
            raise ValueError(
                f"the model {what} {min(names)} and {len(names) - 1} more that the checkpoint"
                f" {'has' if what == 'lacks' else 'lacks'}: give one that was cut from such a checkpoint"
            )
    return {
        name: new[name.removeprefix(prefix)] if name.startswith(prefix) else value
        for name, value in state.items()
    }
