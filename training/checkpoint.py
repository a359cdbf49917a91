"""Checkpoints that are whole or absent: written beside, synced, renamed; the last K kept.

A checkpoint folder `step_00000500/` holds `trained.safetensors`, `ema.safetensors` (if averaged),
`optimizer.pt` (tensors and numbers, read with weights_only=True), one `rng_<rank>.pt` per process and
`state.json`. Distributed engines that shard the optimiser (FSDP, DeepSpeed) keep their own files in
`engine/`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAME = re.compile(r"step_(\d{8})")


class TrainingError(ValueError):
    """Training stopped for a reason the user can act on; what was saved before is intact."""


def folders(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    found = [p for p in root.glob("step_*") if NAME.fullmatch(p.name) and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: p.name)


def find(root: Path, resume: str) -> Path | None:
    """The checkpoint to resume from: newest for "auto" (None if there is none), or the named folder."""
    if not resume:
        return None
    if resume == "auto":
        complete = folders(root)
        return complete[-1] if complete else None
    path = Path(resume)
    if not (path / "state.json").is_file():
        raise ValueError(
            f"resume is {resume!r}: it is not a checkpoint folder (no state.json); use auto or a step_ folder"
        )
    return path


def rng_state() -> dict[str, Any]:
    """State of the global generators as tensors and numbers only."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _sync(folder: Path) -> None:
    """fsync every file, then the folders, so that the rename below never precedes the data."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows syncs no folders, and no files opened for reading
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Writer:
    """One checkpoint being written. Use as a context: on success it is renamed into place and old ones go.

    Only the main process calls `__enter__`/`__exit__`; others may write files into `.folder` in between. A
    failure removes the unfinished folder and leaves the earlier checkpoints alone.
    """

    def __init__(self, root: Path, step: int, keep: int):
        self.root, self.keep = root, keep
        self.final = root / f"step_{step:08d}"
        self.folder = root / f".writing_{self.final.name}"

    def __enter__(self) -> Writer:
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise self._failure(error) from error
        return self

    def tensors(self, name: str, values: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, self.folder / name)

    def state(self, values: dict[str, Any]) -> None:
        (self.folder / "state.json").write_text(json.dumps(values, indent=1), encoding="utf-8")

    def _failure(self, error: BaseException) -> TrainingError:
        complete = folders(self.root)
        last = (
            f"the last good checkpoint {complete[-1]} is intact"
            if complete
            else "there is no earlier checkpoint"
        )
        return TrainingError(f"cannot write the checkpoint {self.final} ({error}): free some space; {last}")

    def __exit__(self, kind, error, trace) -> bool:
        if error is None:
            try:
                _sync(self.folder)
                if self.final.exists():
                    shutil.rmtree(self.final)
                os.replace(self.folder, self.final)
                _sync_one(self.root)
                for old in folders(self.root)[: -self.keep]:
                    shutil.rmtree(old, ignore_errors=True)
                return False
            except OSError as late:
                error = late
        shutil.rmtree(self.folder, ignore_errors=True)
        from safetensors import SafetensorError

        if isinstance(error, (OSError, SafetensorError, RuntimeError)):
            raise self._failure(error) from error
        return False


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / name)


def copy_into(parameters: dict[str, Tensor], values: dict[str, Tensor], where: str) -> None:
    """Copy saved values into parameters of the same names. Raises ValueError if the sets differ."""
    if set(parameters) != set(values):
        odd = sorted(set(parameters) ^ set(values))[0]
        raise ValueError(
            f"{where} does not fit the model: {odd} is on one side only; was the recipe changed?"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != values[name].shape:
                raise ValueError(
                    f"{where} does not fit the model: {name} is {list(values[name].shape)}, the model has "
                    f"{list(parameter.shape)}; was the recipe changed?"
                )
            parameter.copy_(values[name])
