"""Data for reward training that has no wanted pictures: sources with instructions, from a folder or a batch.

The source stands where supervised data has the target; only its size is used (`use_targets: false`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .data.files import SUFFIXES
from .pictures import to_pil


def has_targets(folder: Path) -> bool:
    """Whether a data folder is more than pictures with instructions."""
    files = [path for path in folder.iterdir() if path.is_file()]
    plain = [path for path in files if path.suffix.lower() in SUFFIXES]
    targets = any(path.stem.endswith("_target") for path in plain)
    described = any((folder / f"{_stem(path)}.txt").is_file() for path in plain)
    return targets or not described


def _stem(picture: Path) -> str:
    return picture.stem.removesuffix("_source")


def list_sources(folder: Path, root: Path) -> str:
    """The spec of a folder of NAME.png (or NAME_source.png) with NAME.txt; JSON lines go to `root`."""
    rows = []
    for path in sorted(folder.iterdir()):
        text = folder / f"{_stem(path)}.txt"
        if path.suffix.lower() in SUFFIXES and not path.stem.endswith("_mask") and text.is_file():
            prompt = " ".join(text.read_text(encoding="utf-8-sig").split())
            rows.append({"prompt": prompt, "image": str(path), "source": str(path)})
    return _write_rows(rows, root)


def save_sources(images: Tensor, instructions: str, root: Path) -> str:
    """The spec of an IMAGE batch [B,H,W,C] with one instruction per line (one line serves all pictures).

    Raises ValueError if there are neither one nor B instructions.
    """
    lines = [" ".join(line.split()) for line in instructions.splitlines() if line.strip()]
    if len(lines) not in (1, len(images)):
        raise ValueError(
            f"instructions has {len(lines)} lines for {len(images)} images: write one line, or one for each."
        )
    rows = []
    for number, image in enumerate(images):
        picture = to_pil(image)
        digest = hashlib.sha256(picture.tobytes() + str(picture.size).encode()).hexdigest()[:16]
        path = root / "given" / f"{digest}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            picture.save(path)
        prompt = lines[number if len(lines) > 1 else 0]
        rows.append({"prompt": prompt, "image": str(path), "source": str(path)})
    return _write_rows(rows, root)


def _write_rows(rows: Sequence[dict[str, str]], root: Path) -> str:
    text = "\n".join(json.dumps(row) for row in rows)
    path = root / "given" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return f"jsonl:{path}"
