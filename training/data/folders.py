"""Folders as people have them: which files count, and text in whatever encoding it was saved. No images."""

from __future__ import annotations

import codecs
from pathlib import Path

SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"))
TEXT_LIMIT = 2**16  # bytes of a caption: the longest prompt a model reads is a few thousand

_MARKS = (  # UTF-32 first: its mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


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
