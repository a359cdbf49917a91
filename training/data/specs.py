"""Specs of sources (`sources.open_source`) for those who write none: a folder is recognised by its files, a
batch of images is saved.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import Tensor

from ...models.image_files import looks_like_image
from ...models.pixels import as_image, on_white
from .files import files_below, split_name, visible_files
from .sample import to_pil
from .sources import split_spec


def spec_of(folder: str | Path, inside: bool = False) -> str:
    """The spec of the dataset that a folder holds, recognised by its files.

    inside: rows of a table may not name files outside of the folder (for folders that others can fill).

    Raises ValueError, naming what a folder may hold, when it holds nothing known; FileNotFoundError when it
    is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist")
    files = visible_files(folder)
    if any(path.stem.endswith(("_source", "_target")) for path in files):
        return _spec("pairs", folder)
    rows = [path for path in files if path.suffix.lower() == ".jsonl"]
    if rows := rows or [path for path in files if path.name.lower() == "metadata.csv"]:
        return _spec("jsonl", rows[0], "?inside=true" if inside else "")
    if (folder / "masked_latents").is_dir() and (index := [path for path in files if path.suffix == ".json"]):
        return _spec("precomputed", index[0], "?inside=true" if inside else "")
    if tables := files_below(folder, ".parquet"):
        from .hub import column_names

        columns = column_names(tables[0])
        if "source_img" in columns:
            return _spec("magicbrush", folder)
        if "src_img" in columns:
            return _spec("omniedit", folder)
    raise ValueError(
        f"data folder {folder} holds no training data: put NAME_source.png, NAME_target.png and NAME.txt "
        "there (edit pairs), a .jsonl file with prompt, image and mask (inpainting), or MagicBrush or "
        "OmniEdit parquet files"
    )


def _spec(kind: str, path: Path, options: str = "") -> str:
    """The spec of a path; a name that ends like a weight (cats@2) gets one of its own behind it."""
    spec = f"{kind}:{path}{options}"
    return spec if split_spec(spec)[2] is None else f"{spec}@1"


def has_targets(folder: Path) -> bool:
    """Whether a data folder is more than images with instructions."""
    files = visible_files(folder)
    names = [split_name(path.stem) for path in files if looks_like_image(path)]
    texts = {split_name(path.stem)[0] for path in files if path.suffix.lower() == ".txt"}
    described = any(name in texts for name, role in names if role in ("", "source"))
    return any(role == "target" for _, role in names) or not described


def edit_sources(folder: Path) -> str:
    """The spec of a folder without targets: NAME.png (or NAME_source.png) with the instruction NAME.txt.

    The source stands where supervised data has the target; only its size is used.
    """
    return f"images:{folder}?edit=true"


def save_sources(images: Tensor, instructions: str, root: Path) -> str:
    """The spec of an IMAGE batch [B,H,W,C] with one instruction per line (one line serves all images).

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
        pixels = to_pil(image)
        digest = hashlib.sha256(pixels.tobytes() + str(pixels.size).encode()).hexdigest()[:16]
        path = folder / f"{digest}.png"
        if not path.is_file():
            pixels.save(path)
        prompt = lines[number if len(lines) > 1 else 0]
        rows.append({"prompt": prompt, "image": path.name, "source": path.name})
    text = "\n".join(json.dumps(row) for row in rows)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    path.write_text(text, encoding="utf-8")
    return f"jsonl:{path}"
