"""Stable Diffusion's single-file checkpoints as plain state dicts: reading, writing, cutting apart.

Only tensors are read: safetensors, or pickles under weights_only. Diffusers folders are loaded elsewhere.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

DENOISER = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
PICKLES = (".ckpt", ".pt", ".pth")
SUFFIXES = (*PICKLES, ".safetensors")

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
