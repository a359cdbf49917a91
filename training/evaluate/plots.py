"""Images about training: contact sheets and loss curves, drawn with PIL alone. Not for models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...models.image_files import to_pil

INK, PALE, PAPER = (30, 30, 34), (150, 150, 156), (250, 250, 248)
LINE, FAINT = (38, 99, 186), (196, 212, 236)


def tile(image: Tensor, side: int) -> Image.Image:
    """[H,W,3] in 0..1 as an image whose longer side is `side`; small ones enlarged pixel by pixel."""
    image = to_pil(image[..., :3])
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
    """Rows of images [H,W,3] in 0..1 with a text under each row, `columns` rows beside one another.

    side: of an image's longer side, in pixels; headings: over the images. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row of images")
    font, gap, text_height, top = ImageFont.load_default(12), 6, 32, 22 if headings else 6
    count = max(len(images) for images, _ in rows)
    tall = max(math.ceil(side * min(1, i.shape[0] / i.shape[1])) for images, _ in rows for i in images)
    width, height = count * (side + 2) + gap, tall + text_height + gap
    columns = min(columns, len(rows))
    sheet = Image.new("RGB", (columns * width + gap, math.ceil(len(rows) / columns) * height + top), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        for number, heading in enumerate(headings):
            draw.text((gap + column * width + number * (side + 2), 4), heading, PALE, font)
    for index, (images, text) in enumerate(rows):
        x, y = gap + index % columns * width, top + index // columns * height
        for number, image in enumerate(images):
            sheet.paste(tile(image, side), (x + number * (side + 2), y))
        words = _wrapped(text.encode("latin-1", "replace").decode("latin-1"), font, width - gap, 2)
        draw.multiline_text((x, y + tall + 2), words, INK, font, spacing=1)
    return sheet


def curve(
    points: Iterable[tuple[float, float]], *, title: str = "loss", size: tuple[int, int] = (640, 360)
) -> Image.Image:
    """A line plot of (step, value): the values pale, their running mean strong.

    size: (width, height) in pixels. Values that are not finite are left out; an empty plot says so.
    """
    width, height = size
    image = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    left, right, top, bottom = 56, width - 12, 26, height - 26
    draw.text((left, 6), title, INK, font)
    draw.rectangle((left, top, right, bottom), outline=PALE)
    points = [(step, float(value)) for step, value in points if math.isfinite(value)]
    if not points:
        draw.text((left + 8, top + 8), "no values yet", PALE, font)
        return image
    x, y = np.array(points, dtype=float).T
    mean = _running_mean(y, max(1, len(y) // 20))
    low, high = float(y.min()), float(np.quantile(y, 0.99))
    high = high if high > low else low + max(abs(low), 1e-6) * 0.1
    px = left + (x - x[0]) / max(x[-1] - x[0], 1) * (right - left)
    for series, colour, thick in ((y, FAINT, 1), (mean, LINE, 2)):
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


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means [N] of each value and those before it, `window` together at most."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - window, 0)
    return (total[end] - total[begin]) / (end - begin)


def as_image(image: Image.Image) -> Tensor:
    """A PIL image as IMAGE [1,H,W,3] float32 in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)[None]
