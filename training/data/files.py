"""Data kept as plain files: a folder of before/after pairs, and JSONL for inpainting."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

from .broken import BrokenSample
from .sample import Sample, read_image, read_mask, read_size, stamp

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Pairs:
    """`name_source.png`, `name_target.png`, `name.txt` (the instruction), optionally `name_mask.png`, in one
    folder.

    A name with only some of its three files is a broken example, not a silent gap.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"data folder {folder} does not exist")
        self._files = {path.name: path for path in sorted(self.folder.iterdir()) if path.is_file()}
        self._names = sorted(
            {
                Path(name).stem.removesuffix(ending)
                for name in self._files
                for ending in ("_source", "_target")
                if Path(name).suffix.lower() in SUFFIXES and Path(name).stem.endswith(ending)
            }
        )
        if not self._names:
            raise ValueError(
                f"data folder {folder} holds no pairs: name the files NAME_source.png, NAME_target.png and "
                "NAME.txt"
            )

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def fingerprint(self) -> str:
        files = [(name, path.stat()) for name, path in self._files.items()]
        return stamp("pairs", [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])

    def name(self, index: int) -> str:
        return str(self.folder / self._names[index])

    def _picture(self, index: int, role: str) -> Path:
        for suffix in SUFFIXES:
            for variant in (suffix, suffix.upper()):
                if path := self._files.get(f"{self._names[index]}_{role}{variant}"):
                    return path
        raise BrokenSample(self.name(index), f"{self._names[index]}_{role}.png is missing")

    def size(self, index: int) -> tuple[int, int]:
        return read_size(self._picture(index, "target"), self.name(index))

    def __getitem__(self, index: int) -> Sample:
        name, stem = self.name(index), self._names[index]
        if not (text := self._files.get(f"{stem}.txt")):
            raise BrokenSample(name, f"{stem}.txt with the instruction is missing")
        try:
            prompt = " ".join(text.read_text(encoding="utf-8-sig").split())
        except (OSError, UnicodeDecodeError) as error:
            raise BrokenSample(name, f"{text.name} is not readable UTF-8 ({error})") from error
        if not prompt:
            raise BrokenSample(name, f"{text.name} is empty")
        target_path = self._picture(index, "target")
        target = read_image(target_path, name)
        try:
            mask_path = self._picture(index, "mask")
        except BrokenSample:
            mask_path = None
        return Sample(
            prompt,
            target,
            read_image(self._picture(index, "source"), name),
            read_mask(mask_path, name, target.shape[:2]) if mask_path else None,
            name=name,
            image_path=target_path,
            mask_path=mask_path,
        )


class JsonLines:
    """Inpainting data: one JSON object per line, paths relative to the file.

    Keys: "prompt"; "image" (or "file_name", as in a Hugging Face `metadata.jsonl`); "mask" (white = repaint;
    absent or null: the trainer draws one); optionally "class": "class" marks prior-preservation pictures,
    "weight" multiplies the loss, "source" makes it an edit pair. An unreadable line is one broken example,
    named with its line number.
    """

    def __init__(self, file: str | Path):
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"data file {file} does not exist")
        lines = self.file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
        self._lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not self._lines:
            raise ValueError(f"data file {file} is empty: write one JSON object per line")

    def __len__(self) -> int:
        return len(self._lines)

    @cached_property
    def fingerprint(self) -> str:
        return stamp("jsonl", str(self.root), self._lines)

    @cached_property
    def root(self) -> Path:
        return self.file.resolve().parent

    def name(self, index: int) -> str:
        return f"{self.file}:{self._lines[index][0]}"

    def _row(self, index: int) -> dict:
        name = self.name(index)
        try:
            row = json.loads(self._lines[index][1])
        except ValueError as error:
            raise BrokenSample(name, f"not a line of JSON ({error})") from error
        if not isinstance(row, dict):
            raise BrokenSample(name, "not a JSON object")
        if "image" not in row and "file_name" in row:
            row["image"] = row["file_name"]
        for key in ("prompt", "image"):
            if not isinstance(row.get(key), str):
                raise BrokenSample(name, f"the key {key!r} is missing or no text")
        return row

    def size(self, index: int) -> tuple[int, int]:
        return read_size(self.root / self._row(index)["image"], self.name(index))

    def __getitem__(self, index: int) -> Sample:
        row, name = self._row(index), self.name(index)
        image_path = self.root / row["image"]
        mask_path = self.root / row["mask"] if row.get("mask") else None
        image = read_image(image_path, name)
        try:
            weight = float(row.get("weight", 1.0))
        except (TypeError, ValueError):
            raise BrokenSample(name, f"weight is {row['weight']!r}, not a number") from None
        return Sample(
            row["prompt"],
            image,
            read_image(self.root / row["source"], name) if row.get("source") else None,
            read_mask(mask_path, name, image.shape[:2]) if mask_path else None,
            name=name,
            image_path=image_path,
            mask_path=mask_path,
            role="class" if row.get("class") == "class" else "instance",
            weight=weight,
        )
