"""Checkpoints that are whole or absent: written beside, synced, renamed; the last K kept.

A checkpoint folder `step_00000500/` holds `trained.safetensors`, `ema.safetensors` (if averaged),
`optimizer.pt` (tensors and numbers, read with weights_only=True), one `rng_<rank>.pt` per process and
`state.json`, which knows size and SHA-256 of every other file. Distributed engines that shard the optimiser
(FSDP, DeepSpeed) keep their own files in `engine/`.

accelerate's `save_state` is not used: it writes into the final folder, knows no hashes, and keeps no average.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import disk

logger = logging.getLogger(__name__)

NAME = re.compile(r"step_(\d{8,})")
STATE = "state.json"
ESSENTIAL = ("trained.safetensors", "engine/")  # without its other parts a run can go on, less exactly
UNFINISHED = (".writing_*", ".old_*")


class TrainingError(ValueError):
    """Training stopped for a reason the user can act on; what was saved before is intact."""


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from, and which of its files cannot be used."""

    folder: Path
    lacking: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Whether this file can be used."""
        return name not in self.lacking and (self.folder / name).is_file()


def step_of(folder: Path) -> int:
    """The optimiser steps that a checkpoint's name says."""
    return int(NAME.fullmatch(folder.name).group(1))


def _all(root: Path) -> list[Path]:
    return sorted((p for p in root.glob("step_*") if NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def folders(root: Path) -> list[Path]:
    """Checkpoints under `root`, oldest first; whether their files are whole says `faults`."""
    return [folder for folder in _all(root) if (folder / STATE).is_file()]


def last_good(root: Path) -> str:
    """Half a sentence for errors: which checkpoint there is to go on from."""
    complete = folders(root)
    return f"the last good checkpoint {complete[-1]} is intact" if complete else "there is no checkpoint yet"


def faults(folder: Path) -> dict[str, str]:
    """{file: what is wrong with it} of a checkpoint, by the sizes and hashes noted in its state.json."""
    try:
        noted = read_state(folder).get("files")
    except ValueError as error:
        return {STATE: str(error)}
    if noted is None:  # written before there were hashes
        names = ("trained.safetensors", "optimizer.pt")
        sharded = (folder / "engine").is_dir()
        return {} if sharded else {n: "is missing" for n in names if not (folder / n).is_file()}
    wrong = {}
    for name, (size, digest) in noted.items():
        try:
            have = (folder / name).stat().st_size
            if have != size:
                wrong[name] = f"has {have} of {size} bytes"
            elif _digest(folder / name) != digest:
                wrong[name] = "has other content than was written"
        except FileNotFoundError:
            wrong[name] = "is missing"
        except OSError as error:
            wrong[name] = f"cannot be read ({disk.reason(error)})"
    return wrong


def _usable(folder: Path, wrong: dict[str, str]) -> bool:
    return not any(name == STATE or name.startswith(ESSENTIAL) for name in wrong)


def _told(folder: Path, wrong: dict[str, str]) -> str:
    return f"checkpoint {folder} is damaged ({', '.join(f'{name} {what}' for name, what in wrong.items())})"


def find(root: Path, resume: str) -> Found | None:
    """The checkpoint to resume from, its files verified; None for "" and for "auto" where there is none.

    "auto" takes the newest whole one; where none is whole, the newest that has its weights. Those in `root`
    that are newer than the one taken are set aside and named, so that they do not mix with what follows.
    Raises ValueError where nothing can be used.
    """
    if not resume:
        return None
    if resume != "auto":
        return _named(root, Path(resume))
    wrong = {}
    for folder in reversed(_all(root)):
        wrong[folder] = faults(folder)
        if not wrong[folder]:
            break
    if not wrong:
        return None
    found = next((f for f, w in wrong.items() if not w), None)
    found = found or next((f for f, w in wrong.items() if _usable(f, w)), None)
    if found is None:
        told = "; ".join(_told(folder, what) for folder, what in wrong.items())
        raise ValueError(f"{told}: none can be resumed, remove {root} to begin anew")
    for folder in [folder for folder in wrong if step_of(folder) > step_of(found)]:
        aside = _set_aside(folder, "damaged")
        logger.warning(
            "%s: going on from %s; it is kept as %s", _told(folder, wrong[folder]), found, aside.name
        )
    return _found(found, wrong[found])


def _named(root: Path, folder: Path) -> Found:
    if not (folder / STATE).is_file():
        raise ValueError(
            f"resume is {str(folder)!r}: it is no checkpoint folder (no {STATE}); use auto or a step_ folder"
        )
    wrong = faults(folder)
    if not _usable(folder, wrong):
        raise ValueError(f"resume: {_told(folder, wrong)}: use auto, which takes the newest whole one")
    if NAME.fullmatch(folder.name) and folder.resolve().parent == root.resolve():
        for newer in [p for p in _all(root) if step_of(p) > step_of(folder)]:
            logger.warning(
                "going back to %s: %s is kept as %s", folder, newer, _set_aside(newer, "later").name
            )
    return _found(folder, wrong)


def _found(folder: Path, wrong: dict[str, str]) -> Found:
    if wrong:
        what = ", ".join(f"{name} {why}" for name, why in wrong.items())
        logger.warning("%s is not whole (%s): what is missing begins anew", folder, what)
    return Found(folder, tuple(wrong))


def _set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint so that it is neither resumed by "auto" nor counted among those to keep."""
    number, aside = 2, folder.with_name(f"{why}_{folder.name}")
    while aside.exists():
        number, aside = number + 1, folder.with_name(f"{why}_{folder.name}_{number}")
    with contextlib.suppress(OSError):
        folder.rename(aside)
    return aside


def sweep(root: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for pattern in UNFINISHED:
        for folder in root.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; killed in the middle, it is no checkpoint any more."""
    gone = folder.with_name(f".old_{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()


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
        self.values: dict[str, Any] = {}

    def __enter__(self) -> Writer:
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise self._failure(error) from error
        return self

    def tensors(self, name: str, values: dict[str, Tensor]) -> None:
        """Write a safetensors file into the folder."""
        from safetensors.torch import save_file

        save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, self.folder / name)

    def state(self, values: dict[str, Any]) -> None:
        """What `state.json` will hold; it is written last, when all processes have written their parts."""
        self.values = values

    def _seal(self) -> None:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        noted = {
            path.relative_to(self.folder).as_posix(): [path.stat().st_size, _digest(path)] for path in files
        }
        text = json.dumps({**self.values, "files": noted}, indent=1)
        (self.folder / STATE).write_text(text, encoding="utf-8")

    def _failure(self, error: BaseException) -> TrainingError:
        remedy = "free some space" if disk.is_full(error) else "see that its disk can be written"
        return TrainingError(
            f"cannot write the checkpoint {self.final} ({error}): {remedy}; {last_good(self.root)}"
        )

    def __exit__(self, kind, error, trace) -> bool:
        if error is None:
            try:
                self._seal()
                _sync(self.folder)
                if self.final.exists():
                    _remove(self.final)
                os.replace(self.folder, self.final)
                _sync_one(self.root)
            except OSError as late:
                error = late
            else:
                for old in [p for p in folders(self.root)[: -self.keep] if p != self.final]:
                    _remove(old)
                return False
        shutil.rmtree(self.folder, ignore_errors=True)
        if disk.failed_write(error):
            raise self._failure(error) from error
        return False


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises ValueError where it is damaged."""
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"is no readable JSON ({error})") from None
    if not isinstance(values, dict) or "step" not in values:
        raise ValueError("does not say which step it is of")
    return values


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """A checkpoint's safetensors file, on the CPU."""
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
