"""Where results go: a look at the place before the work, another place when it fails after it.

Knows no model and no image. Raises ValueError in one sentence, so that a command can refuse before it loads
anything.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
LONGEST_NAME = 255  # bytes of one file name on every common file system
FORBIDDEN = '<>:"/\\|?*'  # what Windows, and therefore a shared folder, refuses
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def check_name(name: str, what: str) -> str:
    """A plain file name that every file system takes. Raises ValueError naming `what`."""
    if not name or name != name.strip() or name.startswith(".") or name.endswith("."):
        raise ValueError(f"{what} is {name!r}: use a plain file name, without a dot or space around it")
    wrong = next((c for c in name if c in FORBIDDEN or ord(c) < 32), None)
    if wrong is not None:
        raise ValueError(f"{what} is {name!r}: use a plain file name without folders and without {wrong!r}")
    if name.split(".")[0].lower() in RESERVED:
        raise ValueError(f"{what} is {name!r}, which Windows keeps for a device: choose another name")
    if len(os.fsencode(name)) > LONGEST_NAME - 55:  # a suffix, a number, `.part` are still added
        raise ValueError(f"{what} has {len(os.fsencode(name))} bytes: use at most {LONGEST_NAME - 55}")
    return name


def check_folder(folder: str | Path, what: str = "output folder", need: int = 0) -> Path:
    """A folder that exists or can be made, can be written, and has room for `need` bytes; makes nothing.

    Raises ValueError.
    """
    folder = Path(folder)
    existing = folder
    try:
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise ValueError(f"{what} {folder} cannot be used: {existing} is a file, choose another folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{what} {folder} cannot be written ({reason(error)}): choose another") from error
    check_room(existing, need, f"{what} {folder}")
    return folder


def check_file(path: str | Path, what: str = "output", need: int = 0) -> Path:
    """A file that can be written into a folder that exists. Raises ValueError."""
    path = Path(path)
    if len(os.fsencode(path.name)) > LONGEST_NAME - 20:
        raise ValueError(f"{what} {path.name[:40]}... has too long a name: use a shorter one")
    if path.is_dir():
        raise ValueError(f"{what} {path} is a folder: name a file, for example {path / 'result'}")
    if not path.parent.exists():
        raise ValueError(f"{what} {path} cannot be written: its folder does not exist, create {path.parent}")
    check_folder(path.parent, f"{what} {path.name} in", need)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{what} {path} is write-protected: choose another name")
    return path


def check_room(folder: Path, need: int, what: str) -> None:
    """Raise ValueError where the disk of an existing folder has not `need` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ValueError(
            f"{what} needs about {size(need)} but its disk has {size(free)} left: free some space, or choose "
            "another disk"
        )


def size(count: float) -> str:
    """Bytes in words: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("bytes", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def reason(error: BaseException) -> str:
    """Why the system refused, in its words, without the errno."""
    return getattr(error, "strerror", None) or str(error)


def failed_write(error: BaseException) -> bool:
    """Whether an error says that a file could not be written: the system's, or a library's wrapping of it."""
    if isinstance(error, OSError):
        return True
    text = str(error)
    if type(error).__name__ == "SafetensorError":
        return "os error" in text.lower() or "I/O" in text
    return isinstance(error, RuntimeError) and (
        "PytorchStreamWriter" in text or "iostream error" in text or "unexpected pos" in text
    )


def write_whole(path: Path, write: Callable[[Path], T]) -> T:
    """Let `write` make a file beside `path`, and give it the name when it is complete."""
    path = path.resolve()
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        made = write(partial)
        os.replace(partial, path)
        return made
    finally:
        partial.unlink(missing_ok=True)


def places(path: Path) -> Sequence[Path]:
    """Where `path` goes if its own folder cannot be written: here, home, the system's temporary folder."""
    folders = dict.fromkeys([Path.cwd(), Path.home(), Path(tempfile.gettempdir())])
    return [_free(folder / path.name) for folder in folders if folder.resolve() != path.parent.resolve()]


def _free(path: Path) -> Path:
    """A name that is not taken yet: nobody's file is overwritten where they did not ask for it."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.stem}_{number}{path.suffix}"), number + 1
    return free


def keep(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a finished result to `path`, or if that fails to another place, and say so; returns where.

    write: makes the file or folder at the path it is given. Raises the first error if no place takes it.
    """
    path = Path(path)
    try:
        write(path)
        return path
    except Exception as error:
        if not failed_write(error):
            raise
        first = error
    for place in places(path):
        try:
            write(place)
        except Exception as error:
            if not failed_write(error):
                raise
            continue
        logger.warning("%s cannot be written (%s): saved as %s instead", path, reason(first), place)
        return place
    raise first


def keep_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """`keep` of one file that is `write_whole`: whole or not at all, here or elsewhere; returns where."""
    return keep(path, lambda place: write_whole(place, write))


def is_full(error: BaseException) -> bool:
    """Whether the disk, or the user's share of it, is used up."""
    return getattr(error, "errno", None) in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
