"""Images against texts by their similarities: the best of each, in words and on a sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...models import pixels
from .plots import as_image, contact_sheet

COLUMNS = 4  # of the sheet


@dataclass(frozen=True)
class Likeness:
    """best [T]: for each text the number (from 0) of the image most like it; cosines [T]: how like it is.

    images: those images [T,H,W,C]; sheet: every image with the text most like it; text: all of it in words.
    """

    best: list[int]
    cosines: list[float]
    images: Tensor
    sheet: Tensor
    text: str


def compare(images: Tensor, texts: Sequence[str], similarities: Tensor) -> Likeness:
    """IMAGE [B,H,W,C], T texts and their cosines [B,T]."""
    images = pixels.as_image(images, "images")
    cosines, best = similarities.max(dim=0)
    lines = []
    for column, text in enumerate(texts):
        lines.append(f"{text}")
        order = similarities[:, column].argsort(descending=True, stable=True).tolist()
        lines += [f"  {similarities[row, column]:+.3f}  image {row + 1}" for row in order]
    rows = []
    for row, image in enumerate(pixels.on_white(images)):
        like = int(similarities[row].argmax())
        name = f"{row + 1}: {similarities[row, like]:+.3f}"
        rows.append(([image], f"{name} {texts[like]}" if len(texts) > 1 else name))
    sheet = contact_sheet(rows, side=160, columns=min(COLUMNS, len(rows)))
    return Likeness(best.tolist(), cosines.tolist(), images[best], as_image(sheet), "\n".join(lines))
