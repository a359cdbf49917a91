"""Pictures about training: contact sheets and loss curves, drawn with PIL alone. Not for models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...models.image_files import to_pil

INK, PALE, PAPER, LINE = (30, 30, 34), (150, 150, 156), (250, 250, 248), (38, 99, 186)


def tile(picture: Tensor, side: int) -> Image.Image:
    """[H,W,3] in 0..1 as a picture whose longer side is `side`; small ones enlarged pixel by pixel."""
    image = to_pil(picture[..., :3])
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _wrapped(text: str, font: ImageFont.ImageFont, width: int, lines: int) -> str:
    rows: list[str] = []
    for word in text.split():
        joined = f"{rows[-1]} {word}" if rows else word
        if rows and font.getlength(joined) <= width:
            rows[-1] = joined
        else:
            rows.append(word)
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1] + " ..."]
    return "\n".join(rows)


def contact_sheet(
    rows: Sequence[tuple[Sequence[Tensor], str]],
    headings: Sequence[str] = (),
    *,
    side: int = 128,
    columns: int = 3,
) -> Image.Image:
    """Rows of pictures [H,W,3] with a text under each row, `columns` rows beside one another; headings on
    top.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row of pictures")
    font, gap, text_height, top = ImageFont.load_default(12), 6, 32, 22 if headings else 6
    count = max(len(pictures) for pictures, _ in rows)
    width, height = count * (side + 2) + gap, side + text_height + gap
    columns = min(columns, len(rows))
    sheet = Image.new("RGB", (columns * width + gap, math.ceil(len(rows) / columns) * height + top), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        for number, heading in enumerate(headings):
            draw.text((gap + column * width + number * (side + 2), 4), heading, PALE, font)
    for index, (pictures, text) in enumerate(rows):
        x, y = gap + index % columns * width, top + index // columns * height
        for number, picture in enumerate(pictures):
            sheet.paste(tile(picture, side), (x + number * (side + 2), y))
        words = _wrapped(text.encode("latin-1", "replace").decode("latin-1"), font, width - gap, 2)
        draw.multiline_text((x, y + side + 2), words, INK, font, spacing=1)
    return sheet


def curve(
    values: Sequence[float],
    *,
    steps: Sequence[int] | None = None,
    title: str = "loss",
    size: tuple[int, int] = (640, 360),
) -> Image.Image:
    """A line plot: the values pale, their running mean strong. NaNs are left out; an empty plot says so."""
    width, height = size
    image = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    left, right, top, bottom = 56, width - 12, 26, height - 26
    draw.text((left, 6), title, INK, font)
    draw.rectangle((left, top, right, bottom), outline=PALE)
    steps = list(steps) if steps is not None else list(range(1, len(values) + 1))
    points = [(s, float(v)) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    if not points:
        draw.text((left + 8, top + 8), "no values yet", PALE, font)
        return image
    x = np.array([p[0] for p in points], dtype=float)
    y = np.array([p[1] for p in points])
    low, high = float(np.quantile(y, 0.0)), float(np.quantile(y, 0.99))
    high = high if high > low else low + max(abs(low), 1e-6) * 0.1
    span = max(x[-1] - x[0], 1)
    window = max(1, len(y) // 20)
    total = np.cumsum(np.insert(y, 0, 0.0))
    begin = np.maximum(np.arange(len(y)) - window + 1, 0)
    mean = (total[1:] - total[begin]) / (np.arange(len(y)) - begin + 1)
    for series, colour, thick in ((y, (196, 212, 236), 1), (mean, LINE, 2)):
        px = left + (x - x[0]) / span * (right - left)
        py = bottom - np.clip((series - low) / (high - low), 0, 1) * (bottom - top)
        line = list(zip(px.tolist(), py.tolist(), strict=True))
        if len(line) > 1:
            draw.line(line, fill=colour, width=thick)
        else:
            draw.ellipse((line[0][0] - 2, line[0][1] - 2, line[0][0] + 2, line[0][1] + 2), fill=LINE)
    for value, at in ((high, top), (low, bottom - 12)):
        draw.text((4, at), f"{value:.4g}", INK, font)
    draw.text((left, bottom + 6), f"{int(x[0])}", INK, font)
    last = f"{int(x[-1])}   last {mean[-1]:.4g}"
    draw.text((right - font.getlength(last), bottom + 6), last, INK, font)
    return image


def as_image(picture: Image.Image) -> Tensor:
    """A PIL picture as IMAGE [1,H,W,3] float32 in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
