"""Short hashes of what identifies a source of data or a part of a model."""

from __future__ import annotations

import hashlib
from pathlib import Path


def stamp(*parts: object) -> str:
    """16 hex digits of the parts' `repr`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def files_stamp(folder: Path, sample: int = 1 << 16) -> str:
    """16 hex digits of a folder's files: names, sizes, and the first and last `sample` bytes of each."""
    facts = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(sample)
            file.seek(max(0, size - sample))
            facts.append((path.name, size, head, file.read(sample)))
    return stamp(facts)
