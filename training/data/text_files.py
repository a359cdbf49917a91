"""Text as people save it: captions, and rows of JSON lines or CSV, each named by file and line. Opens no
images.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
from pathlib import Path, PureWindowsPath
from typing import Any

from .sample import BrokenSample

LINE_LIMIT = 2**20  # bytes of one row
TEXT_LIMIT = 2**16  # bytes of a caption: the longest prompt a model reads is a few thousand

_MARKS = (  # UTF-32 first: its mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

# What a column may be called; the second names are those of Hugging Face image folders.
ALIASES = {
    "prompt": ("prompt", "text", "caption", "instruction"),
    "image": ("image", "file_name", "image_file_name"),
    "mask": ("mask", "mask_file_name"),
    "source": ("source", "source_file_name"),
    "weight": ("weight",),
    "class": ("class",),
}


def to_utf8(data: bytes) -> bytes:
    """The same text without a byte order mark, in UTF-8 if the mark named another encoding.

    Raises ValueError if the text is not in the encoding that its mark names.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            data = data[len(mark) :]
            return data if encoding == "utf-8" else data.decode(encoding).encode("utf-8")
    return data


def decode(data: bytes) -> str:
    """Text of a file: UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Raises ValueError, a reason with the line, for other encodings: guessing one would teach garbled words.
    """
    try:
        data = to_utf8(data)
    except ValueError as error:
        raise ValueError(f"damaged text ({error})") from error
    if b"\0" in data:
        raise ValueError("not text: it holds NUL characters; save it as UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(data[: error.start].splitlines()) or 1
        raise ValueError(
            f"not UTF-8 in line {line} (byte 0x{data[error.start]:02X}): save the file as UTF-8"
        ) from error


def read_caption(path: Path) -> str:
    """A text file as one line. Raises ValueError with the reason."""
    try:
        with open(path, "rb") as file:
            data = file.read(TEXT_LIMIT + 1)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    if len(data) > TEXT_LIMIT:
        raise ValueError(f"longer than the {TEXT_LIMIT // 1024} KB that a prompt may have")
    words = " ".join(decode(data).split())
    if not words:
        raise ValueError("empty")
    return words


class Rows:
    """The rows of a .jsonl or .csv file; `rows[i]` is a dictionary, or raises BrokenSample."""

    def __init__(self, file: str | Path):
        """Raises FileNotFoundError without a file, ValueError for an empty one or an unknown encoding."""
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"data file {file} does not exist")
        try:
            data = self.file.read_bytes()
            self.lines = _csv(data) if self.file.suffix.lower() == ".csv" else _json_lines(data)
        except (OSError, ValueError) as error:
            raise ValueError(f"data file {file} cannot be read: {error}") from error
        if not self.lines:
            raise ValueError(f"data file {file} is empty: write one JSON object per line")

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, index: int) -> str:
        """The file and the number of the line."""
        return f"{self.file}:{self.lines[index][0]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        content, name = self.lines[index][1], self.name(index)
        row = _parsed(content, name) if isinstance(content, bytes) else content
        if isinstance(row, str):
            raise BrokenSample(name, row)
        if not isinstance(row, dict):
            raise BrokenSample(name, "not a JSON object")
        return {key: value for key, names in ALIASES.items() if (value := _first(row, names)) is not None}


def text(row: dict[str, Any], key: str, name: str, needed: bool = False) -> str | None:
    """A column's text, or None where it is absent or empty. Raises BrokenSample for anything else."""
    value = row.get(key)
    if value is None or (value == "" and not needed):
        if needed:
            raise BrokenSample(name, f"the key {' or '.join(map(repr, ALIASES[key]))} is missing")
        return None
    if not isinstance(value, str):
        raise BrokenSample(name, f"{key} is {str(value)[:40]}: write text in quotes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BrokenSample(name, f"{key} holds half a character (a lone surrogate): write it again") from None
    return value


def weight(row: dict[str, Any], name: str) -> float:
    """The row's weight in the loss, 1 by default. Raises BrokenSample unless it is from 0 to 1000."""
    value = row.get("weight", 1.0)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= 1000:
        raise BrokenSample(name, f"weight is {str(value)[:40]}: write a number from 0 to 1000")
    return number


def locate(root: Path, where: str, inside: bool, name: str) -> Path:
    """The file that a row names, relative to `root`; backslashes, as Windows writes them, separate folders.

    `inside`: refuse, with BrokenSample, what lies outside of `root` by its name. Links are followed: whoever
    made them owns the folder.
    """
    path = root / where
    if "\\" in where and not path.is_file():
        path = root / where.replace("\\", "/")
    if inside and (PureWindowsPath(where).drive or where.startswith(("/", "\\")) or ".." in path.parts):
        raise BrokenSample(name, f"{where} is outside of the data folder {root}: put the file into it")
    return path


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _json_lines(data: bytes) -> list[tuple[int, bytes]]:
    lines = to_utf8(data).splitlines()  # of bytes: by line feeds only, not by U+2028 within a text
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parsed(line: bytes, name: str) -> Any:
    if len(line) > LINE_LIMIT:
        raise BrokenSample(name, f"longer than the {LINE_LIMIT // 2**20} MB that a row may have")
    try:
        return json.loads(line.decode("utf-8"))
    except RecursionError:
        raise BrokenSample(name, "not a line of JSON (nested too deeply)") from None
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise BrokenSample(name, f"not UTF-8 (byte 0x{byte:02X}): save the file as UTF-8") from None
    except ValueError as error:
        raise BrokenSample(name, f"not a line of JSON ({error})") from error


def _csv(data: bytes) -> list[tuple[int, dict[str, Any] | str]]:
    """Rows by the header's names; a text in place of a row says what is wrong with it."""
    reader = csv.reader(io.StringIO(decode(data), newline=""))
    header: list[str] = []
    rows: list[tuple[int, dict[str, Any] | str]] = []
    while True:
        try:
            values = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            rows.append((reader.line_num, f"not a row of CSV ({error})"))
            continue
        if not any(value.strip() for value in values):
            continue
        if not header:
            header = [value.strip() for value in values]
            if not set(header) & set(ALIASES["image"]):
                raise ValueError(f"its first line names no column {' or '.join(ALIASES['image'])}")
            continue
        if len(values) != len(header):
            rows.append((reader.line_num, f"{len(values)} columns where the first line names {len(header)}"))
        else:
            rows.append((reader.line_num, {k: v or None for k, v in zip(header, values, strict=True)}))
    return rows
