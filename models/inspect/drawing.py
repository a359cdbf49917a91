"""Bands of an explaining image (headings, tables of cells, strips, line plots), stacked to an IMAGE.

PIL alone, its built-in font; characters that the font lacks become question marks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, MARGIN = 960, 12
INK, PALE, PAPER = (30, 30, 34), (140, 140, 146), (250, 250, 248)
BLUE, RED, GREEN, AMBER, VIOLET = (38, 99, 186), (196, 48, 48), (44, 132, 74), (206, 132, 22), (120, 70, 170)
COLOURS = (BLUE, RED, GREEN, AMBER, VIOLET, (20, 140, 150), INK)

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Cell:
    """A field of a table: a small line above a larger one, on a ground."""

    small: str
    large: str
    ground: Colour


@dataclass(frozen=True)
class Line:
    """A curve of a plot; `dots` marks its points too."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False
    joined: bool = True


def drawable(text: str) -> str:
    """The text with "?" for what the built-in font cannot draw."""
    text = text.replace("\u2581", "_").replace("\u2192", "->").replace("\u00d7", "x")
    return text.encode("latin-1", "replace").decode("latin-1")


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """PIL's own font."""
    return ImageFont.load_default(size)


def wrapped(text: str, size: int, width: int) -> list[str]:
    """The text in lines of at most `width` pixels; a longer word stands alone."""
    face, lines = font(size), []
    for paragraph in drawable(text).splitlines() or [""]:
        line = ""
        for word in paragraph.split(" "):
            joined = f"{line} {word}" if line else word
            if line and face.getlength(joined) > width:
                lines.append(line)
                line = word
            else:
                line = joined
        lines.append(line)
    return lines


def words(text: str, size: int = 14, colour: Colour = INK) -> Image.Image:
    """A band with a text, broken into lines."""
    lines = wrapped(text, size, WIDTH - 2 * MARGIN)
    step = size + 5
    band = Image.new("RGB", (WIDTH, step * len(lines) + 8), PAPER)
    draw = ImageDraw.Draw(band)
    for number, line in enumerate(lines):
        draw.text((MARGIN, 4 + number * step), line, colour, font(size))
    return band


def strip(grounds: Sequence[Colour], columns: int = 128) -> Image.Image:
    """A band with one small square for each of `grounds`, `columns` to a row."""
    side = (WIDTH - 2 * MARGIN) // columns
    rows = max(1, math.ceil(len(grounds) / columns))
    band = Image.new("RGB", (WIDTH, rows * side + 8), PAPER)
    draw = ImageDraw.Draw(band)
    for number, ground in enumerate(grounds):
        x, y = MARGIN + number % columns * side, 4 + number // columns * side
        draw.rectangle((x, y, x + side - 2, y + side - 2), fill=ground)
    return band


def cells(entries: Sequence[Cell], columns: int = 9) -> Image.Image:
    """A band with a table of cells, row by row; a text too wide for its cell is cut."""
    width, height = (WIDTH - 2 * MARGIN) // columns, 34
    rows = max(1, math.ceil(len(entries) / columns))
    band = Image.new("RGB", (WIDTH, rows * height + 8), PAPER)
    draw = ImageDraw.Draw(band)
    for number, cell in enumerate(entries):
        x, y = MARGIN + number % columns * width, 4 + number // columns * height
        draw.rectangle((x, y, x + width - 3, y + height - 3), fill=cell.ground)
        draw.text((x + 4, y + 1), drawable(cell.small), PALE, font(10))
        draw.text((x + 4, y + 12), _cut(drawable(cell.large), 14, width - 10), INK, font(14))
    return band


def table(rows: Sequence[Sequence[str]], widths: Sequence[int], size: int = 13) -> Image.Image:
    """A band with rows of texts in columns of `widths` pixels; the first row is the heading.

    A text too wide for its column goes on below, so that nothing is lost.
    """
    broken = [
        [wrapped(text, size, width - 10) for text, width in zip(row, widths, strict=True)] for row in rows
    ]
    step = size + 4
    heights = [max(len(lines) for lines in row) * step + 5 for row in broken]
    band = Image.new("RGB", (WIDTH, sum(heights) + 8), PAPER)
    draw, y = ImageDraw.Draw(band), 4
    for number, (row, height) in enumerate(zip(broken, heights, strict=True)):
        x = MARGIN
        for lines, width in zip(row, widths, strict=True):
            for k, line in enumerate(lines):
                draw.text((x, y + k * step), line, PALE if number == 0 else INK, font(size))
            x += width
        draw.line((MARGIN, y + height - 3, WIDTH - MARGIN, y + height - 3), fill=(222, 222, 220))
        y += height
    return band


def plot(
    lines: Sequence[Line],
    *,
    title: str,
    x_name: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    height: int = 330,
) -> Image.Image:
    """A band with curves in fixed ranges, their names to the right; values outside are drawn at the edge."""
    band = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(band)
    box = (MARGIN + 40, 30, WIDTH - 270, height - 40)
    draw.text((MARGIN, 6), drawable(title), INK, font(15))
    _axes(draw, box, x_range, y_range, x_name)
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        points = [(_at(x, x_range, box[0], box[2]), _at(y, y_range, box[3], box[1])) for x, y in _pairs(line)]
        if line.joined and len(points) > 1:
            draw.line(points, fill=colour, width=2)
        if line.dots:
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        y = box[1] + 4
        for earlier in lines[:number]:
            y += 17 * len(wrapped(earlier.name, 13, 225)) + 6
        draw.rectangle((box[2] + 12, y + 4, box[2] + 22, y + 12), fill=colour)
        for k, text in enumerate(wrapped(line.name, 13, 225)):
            draw.text((box[2] + 28, y + 17 * k), text, INK, font(13))
    return band


def _pairs(line: Line) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]


def _axes(draw: ImageDraw.ImageDraw, box: tuple, x_range: tuple, y_range: tuple, x_name: str) -> None:
    left, top, right, bottom = box
    draw.rectangle(box, outline=PALE)
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + part * (right - left), bottom - part * (bottom - top)
        draw.line((x, top, x, bottom), fill=(232, 232, 230))
        draw.line((left, y, right, y), fill=(232, 232, 230))
        text = f"{x_range[0] + part * (x_range[1] - x_range[0]):.4g}"
        draw.text((x - font(11).getlength(text) / 2, bottom + 4), text, PALE, font(11))
        draw.text((MARGIN, y - 7), f"{y_range[0] + part * (y_range[1] - y_range[0]):.3g}", PALE, font(11))
    draw.text((left, bottom + 19), drawable(x_name), INK, font(12))


def _at(value: float, span: tuple[float, float], low: float, high: float) -> float:
    part = (value - span[0]) / (span[1] - span[0])
    return low + min(max(part, 0.0), 1.0) * (high - low)


def _cut(text: str, size: int, width: int) -> str:
    face = font(size)
    while text and face.getlength(text) > width:
        text = text[:-1]
    return text


def stacked(bands: Sequence[Image.Image]) -> Tensor:
    """The bands from top to bottom as an IMAGE [1,H,W,3], float32 in 0..1."""
    image = Image.new("RGB", (WIDTH, sum(band.height for band in bands) + 2 * MARGIN), PAPER)
    y = MARGIN
    for band in bands:
        image.paste(band, (0, y))
        y += band.height
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]
