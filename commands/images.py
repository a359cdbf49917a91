"""Images of the command line: read from files, written to files, and set side by side before and after.

Not for resizing to a model's size: that is `models/diptych.py`.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..models import image_files
from ..models.image_files import to_pil

WRITABLE = (".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
OPAQUE = (".jpg", ".jpeg", ".bmp")
SHOWN_HEIGHT = 256  # smaller images are enlarged in the side-by-side so that its words can be read
MARGIN = 12


def load_image(path: str | Path) -> Tensor:
    """Read an image as IMAGE [1,H,W,C] float32 0..1, upright; C is 4 if it has transparency, else 3.

    Raises FileNotFoundError or ValueError in one sentence.
    """
    with _named(path):
        return image_files.read_image(path, alpha=True)[None]


def load_mask(path: str | Path) -> Tensor:
    """Read a mask as MASK [1,H,W], soft: white repaints; of an image with transparency, what is transparent.

    Raises FileNotFoundError or ValueError in one sentence.
    """
    with _named(path):
        return image_files.read_mask(path)[None]


@contextlib.contextmanager
def _named(path: str | Path) -> Iterator[None]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"image {path} does not exist: check the path")
    try:
        yield
    except image_files.ImageFileError as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def check_writable(path: Path, image: Tensor | None = None) -> None:
    """Raises ValueError, before any work, for an output (of this image's size) that cannot be written."""
    from ..training.runtime.disk import check_file

    if path.suffix.lower() not in WRITABLE:
        raise ValueError(f"output {path} has no image suffix: use one of {', '.join(WRITABLE)}")
    check_file(path, need=(1 << 20) + (0 if image is None else image.numel()))


def save(image: Image.Image, path: Path) -> Path:
    """Write an RGB or RGBA image, whole or not at all; where its path fails, elsewhere, which is said.

    Formats without transparency get a white ground. Returns where it is.
    """
    from ..training.runtime.disk import keep_whole

    if path.suffix.lower() in OPAQUE:
        image = _on_white(image)
    return keep_whole(path, image.save)


def side_by_side_path(path: Path) -> Path:
    """`out.png` -> `out_side_by_side.png`."""
    return path.with_name(f"{path.stem}_side_by_side.png")


def side_by_side(before: Tensor, after: Tensor, caption: str) -> Image.Image:
    """Before | after, [H,W,C] each, under their names and over a caption, on a white sheet."""
    panels = [_enlarged(_on_white(to_pil(image))) for image in (before, after)]
    font = ImageFont.load_default(size=15)
    width = sum(panel.width for panel in panels) + 3 * MARGIN
    height = max(panel.height for panel in panels)
    letters = max(int((width - 2 * MARGIN) / max(font.getlength("n"), 1)), 8)
    lines = textwrap.wrap(caption, letters) or [""]
    line = 20
    sheet = Image.new("RGB", (width, MARGIN + line + height + MARGIN + line * len(lines) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    left = MARGIN
    for name, panel in zip(("before", "after"), panels, strict=True):
        draw.text((left, MARGIN - 2), name, fill="#666666", font=font)
        sheet.paste(panel, (left, MARGIN + line))
        left += panel.width + MARGIN
    for number, text in enumerate(lines):
        draw.text((MARGIN, 2 * MARGIN + line + height + number * line - 4), text, fill="black", font=font)
    return sheet


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(ground, image).convert("RGB")


def _enlarged(image: Image.Image) -> Image.Image:
    times = max(min(-(-SHOWN_HEIGHT // image.height), 8 * SHOWN_HEIGHT // image.width), 1)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
