"""One run per output folder: a lock that the system lifts when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

NAME = ".lock"
BYTE = 1 << 30  # Windows locks bytes, and nobody else may read those: not the ones that say who holds it
BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK, getattr(errno, "EDEADLOCK", errno.EDEADLK))
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # as accelerate looks them up


def is_main_process() -> bool:
    """Whether this is the first process of a run, before accelerate was asked."""
    return next((int(os.environ[name]) for name in RANKS if os.environ.get(name)), 0) == 0


@contextlib.contextmanager
def held(folder: Path, what: str = "output_dir") -> Iterator[None]:
    """Make a folder and hold it for this run; a folder in which nothing was made is taken away again.

    Only the first process of a run holds it. Raises ValueError where another run has it, in this process or
    in another one.
    """
    if not is_main_process():
        yield
        return
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = _locked(folder, what)
    try:
        yield
    finally:
        if file is not None:
            _release(folder / NAME, file)
        with contextlib.suppress(OSError):  # not empty: that is the rule
            for parent in made:
                parent.rmdir()


def _locked(folder: Path, what: str) -> BinaryIO | None:
    while True:
        file = open(folder / NAME, "a+b")
        try:
            _lock(file)
        except OSError as error:
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip()
            file.close()
            if error.errno not in BUSY:
                logger.warning("%s cannot be locked (%s): start no second run in it", folder, error)
                return None
            raise ValueError(
                f"{what} {folder} is in use by another run ({holder or 'unknown'}): wait for it, or choose "
                "another"
            ) from None
        if _is_there(folder / NAME, file):
            break
        file.close()  # its last holder removed it between our opening and our locking
    file.truncate(0)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {platform.node()} since {now}\n".encode())
    file.flush()
    return file


def _lock(file: BinaryIO) -> None:
    if os.name == "nt":
        import msvcrt

        file.seek(BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_there(path: Path, file: BinaryIO) -> bool:
    """Whether the name still belongs to the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError:
        return False


def _release(path: Path, file: BinaryIO) -> None:
    with contextlib.suppress(OSError):
        if os.name == "nt":  # an open file cannot be removed there
            file.close()
            path.unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
            file.close()
