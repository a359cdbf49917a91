"""Datasets read by Hugging Face `datasets`, from the hub or local files: MagicBrush, OmniEdit, captions.

Images are decoded here, one at a time, not by `datasets`, so that one broken image is one named broken
example.
"""

from __future__ import annotations

import glob
import hashlib
import re
from pathlib import Path

from torch import Tensor

from ... import missing
from ..runtime.fingerprints import stamp
from .files import files_below, is_visible
from .sample import BrokenSample, Sample, read_image

_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")
NEEDS_DATASETS = "{} cannot be read: datasets is not installed: run " + missing.install("datasets")


def load_table(where: str, split: str, usual: str, columns: dict[str, bool]):
    """A `datasets.Dataset` with undecoded images.

    Args:
        where: a folder with parquet files or of `save_to_disk`, a parquet file, a glob of them, or a hub id.
        split: "train", "train+dev", ...: of a hub dataset, a saved dictionary, or local files named for
            splits (train-00000-of-00051.parquet, train/0000.parquet); other files are all read.
        usual: the splits to read where `split` is empty, as far as they are there.
        columns: required columns, and whether each holds images.

    Raises:
        ValueError: a required column or split is missing, or a file is damaged.
        FileNotFoundError: a path that looks local does not exist.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(NEEDS_DATASETS.format(where)) from None

    path = Path(where)
    if path.is_dir() and not files_below(path, ".parquet"):
        table = datasets.load_from_disk(where)
        if isinstance(table, datasets.DatasetDict):
            names = _splits(split, usual, set(table), where)
            table = datasets.concatenate_datasets([table[name] for name in names])
    elif path.exists() or glob.has_magic(where):
        named = () if path.is_dir() else map(Path, glob.glob(where, recursive=True))
        files = files_below(path, ".parquet") if path.is_dir() else sorted(filter(is_visible, named))
        if not files:
            raise FileNotFoundError(f"no parquet file matches {where}")
        if path.is_dir() and (found := {name for file in files if (name := _split_of(file))}):
            names = _splits(split, usual, found, where)
            files = [file for file in files if _split_of(file) in (*names, "")]
        try:
            table = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
        except datasets.exceptions.DatasetGenerationError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ValueError(f"a parquet file of {where} cannot be read ({reason}): get it again") from error
    elif path.is_absolute() or where.startswith(".") or where.count("/") != 1:
        raise FileNotFoundError(f"dataset {where} is neither a file or folder here nor a hub id (owner/name)")
    else:
        table = datasets.load_dataset(where, split=split or usual)
    for column, is_image in columns.items():
        if column not in table.column_names:
            raise ValueError(
                f"dataset {where} has no column {column!r} (it has {', '.join(table.column_names)}): "
                "choose another kind"
            )
        if is_image and isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _split_of(file: Path) -> str:
    """The split of a file by its name or its folder's, as the hub has them; "" if neither says."""
    if named := _SHARD.match(file.stem):
        return named[1]
    return file.parent.name if file.parent.name in ("train", "dev", "validation", "test") else ""


def _splits(split: str, usual: str, found: set[str], where: str) -> list[str]:
    """The splits to read out of those that were found. Raises ValueError."""
    if not split:
        return [name for name in usual.split("+") if name in found] or sorted(found)
    if missing := sorted(set(split.split("+")) - found):
        known = ", ".join(sorted(found))
        raise ValueError(f"dataset {where} has no split {missing[0]!r}: choose among {known}")
    return split.split("+")


def column_names(file: Path) -> list[str]:
    """Of a parquet file, without reading it."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(NEEDS_DATASETS.format(file)) from None
    return parquet.read_schema(file).names


def _words(value: object) -> str:
    """A text without the space around it; "" for what is no text."""
    return value.strip() if isinstance(value, str) else ""


def _wording(listed: object, seed: int) -> str:
    """One of several wordings, drawn by the seed and the wordings themselves, not by the row; "" if there is
    none."""
    wordings = list(filter(None, map(_words, listed if isinstance(listed, list) else [listed])))
    if not wordings:
        return ""
    digest = hashlib.sha256("\0".join([str(seed), *wordings]).encode()).digest()
    return wordings[int.from_bytes(digest[:8], "little") % len(wordings)]


class _Table:
    """Rows of a `datasets.Dataset`: `_table`, read from `_where`."""

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        """The dataset and the row's number in it."""
        return f"{self._where}[{index}]"


class Captions(_Table):
    """Images and what they show: two columns of any dataset; of a list of captions one is drawn."""

    def __init__(self, where: str, split: str = "", image: str = "image", text: str = "text", seed: int = 0):
        """split: train if empty. image, text: names of the columns."""
        table = load_table(where, split, "train", {image: True, text: False})
        self._table = table.select_columns([image, text])
        self._where, self._image, self._text, self._seed = where, image, text, seed
        self.fingerprint = stamp("captions", self._table._fingerprint, image, text, seed)

    def __getitem__(self, index: int) -> Sample:
        row, name = self._table[index], self.name(index)
        caption = _wording(row[self._text], self._seed)
        if not caption:
            raise BrokenSample(name, f"{self._text} is empty or no text")
        return Sample(caption, target=read_image(row[self._image], name), caption=caption, name=name)


class MagicBrush(_Table):
    """Columns source_img, target_img, instruction.

    The dataset's images end in rows of noise; `crop` (default on) cuts the bottom height // 32 rows, as
    ICEdit does.
    """

    def __init__(self, where: str, split: str = "", crop: str | bool = True):
        """split: train and dev if empty, which is what ICEdit trains on."""
        columns = {"source_img": True, "target_img": True, "instruction": False}
        self._table = load_table(where, split, "train+dev", columns).select_columns(list(columns))
        self._where, self.crop = where, str(crop).lower() not in ("false", "0", "no")
        self.fingerprint = stamp("magicbrush", self._table._fingerprint, self.crop)

    def _cut(self, image: Tensor) -> Tensor:
        return image[: len(image) - len(image) // 32] if self.crop else image

    def __getitem__(self, index: int) -> Sample:
        row, name = self._table[index], self.name(index)
        if not (prompt := _words(row["instruction"])):
            raise BrokenSample(name, "the instruction is empty or no text")
        source, target = (self._cut(read_image(row[key], name)) for key in ("source_img", "target_img"))
        return Sample(prompt, target, source, name=name)


class OmniEdit(_Table):
    """Columns src_img, edited_img, edited_prompt_list (several wordings) and, where a task filter is set,
    task.

    The wording is drawn at random from the list, seeded by `seed` and the wordings themselves, so that it
    does not depend on the order or the selection of rows. `task`: one task or several with "+"
    ("swap+removal").
    """

    def __init__(self, where: str, split: str = "", task: str = "", seed: int = 0):
        """split: train if empty."""
        columns = {"src_img": True, "edited_img": True, "edited_prompt_list": False}
        if task:
            columns["task"] = False
        table = load_table(where, split, "train", columns)
        if task:
            wanted, found = task.split("+"), table["task"]
            if unknown := set(wanted) - set(found):
                known = ", ".join(sorted(set(found)))
                raise ValueError(f"dataset {where} has no task {sorted(unknown)[0]!r}: choose among {known}")
            table = table.select([i for i, name in enumerate(found) if name in wanted])
        self._table = table.select_columns(
            [*columns, *(["task"] if not task and "task" in table.column_names else [])]
        )
        self._where, self._seed = where, seed
        self.fingerprint = stamp("omniedit", self._table._fingerprint, seed)

    def __getitem__(self, index: int) -> Sample:
        row, name = self._table[index], self.name(index)
        prompt = _wording(row["edited_prompt_list"], self._seed)
        if not prompt:
            raise BrokenSample(name, "edited_prompt_list is empty or no list of texts")
        source, target = (read_image(row[key], name) for key in ("src_img", "edited_img"))
        return Sample(prompt, target, source, name=name, task=row.get("task") or "")
