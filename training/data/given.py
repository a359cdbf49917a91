"""Data for reward training that has no target images: sources with instructions, from a folder or a batch.

The source stands where supervised data has the target; only its size is used.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import Tensor

from ...models.image_files import looks_like_image
from ...models.pixels import as_image, on_white
from .files import split_name
from .folders import visible_files
from .sample import to_pil


def has_targets(folder: Path) -> bool:
    """Whether a data folder is more than images with instructions."""
    files = visible_files(folder)
    names = [split_name(path.stem) for path in files if looks_like_image(path)]
    texts = {split_name(path.stem)[0] for path in files if path.suffix.lower() == ".txt"}
    described = any(name in texts for name, role in names if role in ("", "source"))
    return any(role == "target" for _, role in names) or not described


def list_sources(folder: Path, root: Path) -> str:
    """The spec of a folder of NAME.png (or NAME_source.png) with NAME.txt; nothing is written to `root`."""
    return f"images:{folder}?edit=true"


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
    folder = root / "given"
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(on_white(as_image(images, "images"))):
        picture = to_pil(image)
        digest = hashlib.sha256(picture.tobytes() + str(picture.size).encode()).hexdigest()[:16]
        path = folder / f"{digest}.png"
        if not path.is_file():
            picture.save(path)
        prompt = lines[number if len(lines) > 1 else 0]
        rows.append({"prompt": prompt, "image": path.name, "source": path.name})
    text = "\n".join(json.dumps(row) for row in rows)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    path.write_text(text, encoding="utf-8")
    return f"jsonl:{path}"
