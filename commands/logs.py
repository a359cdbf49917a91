"""What is logged, by -v: warnings; -v: what is being done; -vv: everything, of libraries too. On stderr."""

from __future__ import annotations

import logging

LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
LIBRARIES = ("httpx", "httpcore", "urllib3", "filelock", "PIL", "fsspec", "datasets", "accelerate")


def begin(verbose: int) -> None:
    """Set the level that so many -v ask for."""
    logging.basicConfig(format="%(message)s")
    level = LEVELS[min(verbose, len(LEVELS) - 1)]
    logging.getLogger().setLevel(level)
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.NOTSET if level == logging.DEBUG else logging.WARNING)


def speak() -> None:
    """Show what the trainers log, whatever -v says: it belongs to their progress."""
    root = logging.getLogger()
    root.setLevel(min(root.level, logging.INFO))
