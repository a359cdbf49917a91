"""Data kept as plain files: folders of before/after pairs or captioned images, and rows that name files."""

from __future__ import annotations

import contextlib
import unicodedata
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ...models.image_files import looks_like_image
from ..runtime.fingerprints import stamp
from . import text_files
from .sample import BrokenSample, Sample, read_image, read_mask
from .text_files import read_caption

ROLES = ("source", "target", "mask")
SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"))


def is_visible(path: str | Path) -> bool:
    """Not a dot file (macOS writes `._NAME` beside every NAME on foreign disks) nor a system's own file."""
    name = Path(path).name
    return not name.startswith(".") and name.lower() not in SYSTEM_FILES


def visible_files(folder: str | Path) -> list[Path]:
    """The files of a folder that a person put there, by name."""
    return sorted(path for path in Path(folder).iterdir() if is_visible(path) and path.is_file())


def files_below(folder: str | Path, suffix: str) -> list[Path]:
    """The visible files with a suffix (lower case) in a folder and the visible folders below it, by path."""
    top = Path(folder)
    found = (path for path in top.rglob("*") if path.suffix.lower() == suffix and path.is_file())
    return sorted(path for path in found if all(map(is_visible, path.relative_to(top).parts)))


class _Folder:
    """Images of one folder by what their names say: `NAME_source.png` and `NAME.txt` belong to NAME."""

    kind = ""
    options: tuple[object, ...] = ()  # what else shapes its samples

    def __init__(self, folder: str | Path):
        """Raises FileNotFoundError without a folder."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"data folder {folder} does not exist")
        self._files = visible_files(self.folder)
        self._images: dict[tuple[str, str], list[Path]] = {}  # by (name, role)
        self._texts: dict[str, Path] = {}
        for path in self._files:
            if path.suffix.lower() == ".txt":
                self._texts[_plain(path.stem)] = path
            elif looks_like_image(path):
                self._images.setdefault(split_name(path.stem), []).append(path)
        self._names: list[str] = []

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def fingerprint(self) -> str:
        files = [(path.name, path.stat()) for path in self._files]
        return stamp(
            self.kind, *self.options, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
        )

    def name(self, index: int) -> str:
        """The example's file, without extension, or its line."""
        return str(self.folder / self._names[index])

    def _image(self, index: int, role: str) -> Path | None:
        found = self._images.get((self._names[index], role), [])
        if len(found) > 1:
            both = " and ".join(path.name for path in found[:2])
            raise BrokenSample(self.name(index), f"both {both} are there: keep one")
        return found[0] if found else None

    def _needed(self, index: int, role: str) -> Path:
        if path := self._image(index, role):
            return path
        raise BrokenSample(self.name(index), f"{self._names[index]}_{role}.png is missing")

    def _prompt(self, index: int) -> str:
        name, stem = self.name(index), self._names[index]
        if not (path := self._texts.get(stem)):
            raise BrokenSample(name, f"{stem}.txt with the words is missing")
        try:
            return read_caption(path)
        except ValueError as error:
            raise BrokenSample(name, f"{path.name} is {error}") from error


def _mask(path: Path | None, name: str, image: Tensor) -> Tensor | None:
    """The mask of an image [H,W,3], if there is one. Raises BrokenSample, also if it repaints nothing."""
    if path is None:
        return None
    mask = read_mask(path, name, image.shape[:2])
    if not mask.any():
        raise BrokenSample(
            name, f"the mask {path.name} is empty, nowhere as white as 0.5: paint it or leave it out"
        )
    return mask


def _plain(stem: str) -> str:
    """Names are equal however a file system spells their accents."""
    return unicodedata.normalize("NFC", stem)


def split_name(stem: str) -> tuple[str, str]:
    """NAME_source -> (NAME, source); the role is "" where the name tells none."""
    name, _, role = stem.rpartition("_")
    return (_plain(name), role) if role in ROLES and name else (_plain(stem), "")


class Pairs(_Folder):
    """`name_source.png`, `name_target.png`, `name.txt` (the instruction), optionally `name_mask.png`.

    A name with only some of its three files is a broken example, not a silent gap.
    """

    kind = "pairs"

    def __init__(self, folder: str | Path):
        """Raises FileNotFoundError without a folder, ValueError for one without pairs."""
        super().__init__(folder)
        self._names = sorted({name for name, role in self._images if role in ("source", "target")})
        if not self._names:
            raise ValueError(
                f"data folder {folder} holds no pairs: name the files NAME_source.png, NAME_target.png and "
                "NAME.txt"
            )

    def __getitem__(self, index: int) -> Sample:
        name, prompt = self.name(index), self._prompt(index)
        target_path, mask_path = self._needed(index, "target"), self._image(index, "mask")
        target = read_image(target_path, name)
        return Sample(
            prompt,
            target,
            read_image(self._needed(index, "source"), name),
            _mask(mask_path, name, target),
            name=name,
            image_path=target_path,
            mask_path=mask_path,
        )


class Images(_Folder):
    """`name.png` (or `name_source.png`) with `name.txt`: images and their captions, or instructions to come.

    An image without words is a broken example, unless `prompt` gives words to those that have none.
    """

    kind = "images"

    def __init__(self, folder: str | Path, edit: str | bool = False, prompt: str = ""):
        """edit: the words are instructions and the image is source and target, for reward training. prompt:
        for images without a text file (DreamBooth's instance prompt).

        Raises FileNotFoundError without a folder, ValueError for one without images.
        """
        super().__init__(folder)
        self.edit, self.prompt = str(edit).lower() in ("true", "1", "yes"), prompt.strip()
        self.options = (self.edit, self.prompt)
        self._names = sorted({name for name, role in self._images if role in ("", "source")})
        if not self._names:
            raise ValueError(f"data folder {folder} holds no images: name the files NAME.png and NAME.txt")

    def _prompt(self, index: int) -> str:
        if self.prompt and self._names[index] not in self._texts:
            return self.prompt
        return super()._prompt(index)

    def _path(self, index: int) -> Path:
        path = self._image(index, "") or self._image(index, "source")
        assert path is not None  # the name was made from it
        return path

    def __getitem__(self, index: int) -> Sample:
        name, prompt, path = self.name(index), self._prompt(index), self._path(index)
        mask_path = self._image(index, "mask")
        image = read_image(path, name)
        mask = _mask(mask_path, name, image)
        source = image if self.edit else None
        return Sample(prompt, image, source, mask, name=name, image_path=path, mask_path=mask_path)


class ClassImages:
    """The first `count` images of a folder, all with one prompt and marked `prior`."""

    def __init__(self, folder: str | Path, prompt: str, count: int):
        self.prompt, self.files = prompt, class_files(folder)[:count]
        sizes = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
        self.fingerprint = stamp("class", prompt, sizes)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The example's file, without extension, or its line."""
        return str(self.files[index])

    def __getitem__(self, index: int) -> Sample:
        name = self.name(index)
        return Sample(self.prompt, read_image(self.files[index], name), name=name, role="class")


def class_files(folder: str | Path) -> list[Path]:
    """Images of a folder in name order; none if there is no folder."""
    path = Path(folder)
    return [p for p in visible_files(path) if looks_like_image(p)] if path.is_dir() else []


class JsonLines:
    """Inpainting data: one JSON object per line, or a CSV table, with paths relative to the file.

    Keys: "prompt" (or "text"); "image" (or "file_name", as in a Hugging Face `metadata.jsonl`); "mask" (white
    = repaint; absent or null: the trainer draws one); optionally "class": "class" marks prior-preservation
    images, "weight" multiplies the loss, "source" makes it an edit pair. An unreadable line is one broken
    example, named with its line number.
    """

    def __init__(self, file: str | Path, inside: str | bool = False):
        """inside: refuse files outside of the folder of `file`. Raises FileNotFoundError or ValueError."""
        self.rows = text_files.Rows(file)
        self.inside = str(inside).lower() in ("true", "1", "yes")

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """Of the rows and of the files they name: an image that was replaced is read anew."""
        return stamp("jsonl", str(self.root), self.rows.lines, [self._files_of(i) for i in range(len(self))])

    def _files_of(self, index: int) -> list[tuple[str, int, int]]:
        """(key, size, time) of a row's files that are there."""
        found = []
        with contextlib.suppress(BrokenSample, OSError):
            row = self.rows[index]
            for key in ("image", "mask", "source"):
                if path := self._file(row, key, index):
                    found.append((key, path.stat().st_size, path.stat().st_mtime_ns))
        return found

    @cached_property
    def root(self) -> Path:
        """The folder that its paths are relative to."""
        return self.rows.file.resolve().parent

    def name(self, index: int) -> str:
        """The example's file, without extension, or its line."""
        return self.rows.name(index)

    def _file(self, row: dict, key: str, index: int) -> Path | None:
        name = self.name(index)
        where = text_files.text(row, key, name, needed=key == "image")
        return text_files.locate(self.root, where, self.inside, name) if where else None

    def __getitem__(self, index: int) -> Sample:
        row, name = self.rows[index], self.name(index)
        if (prompt := row.get("prompt")) != "":
            prompt = text_files.text(row, "prompt", name, needed=True)
        weight = text_files.weight(row, name)
        image_path, mask_path, source_path = (
            self._file(row, key, index) for key in ("image", "mask", "source")
        )
        if mask_path == image_path:
            raise BrokenSample(
                name, "image and mask are one file: what its alpha hides is not read, save the mask by itself"
            )
        image = read_image(image_path, name)
        source = read_image(source_path, name) if source_path and source_path != image_path else None
        return Sample(
            prompt,
            image,
            image if source_path == image_path else source,
            _mask(mask_path, name, image),
            name=name,
            image_path=image_path,
            mask_path=mask_path,
            role="class" if row.get("class") == "class" else "instance",
            weight=weight,
        )
