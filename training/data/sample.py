"""One training example, whatever it was read from, and its pictures on disk and in memory.

Not for data set layouts (`sources.py` and its neighbours) or batching (`buckets.py`).
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .broken import BrokenSample

GREY = 0.5  # 0 in the models' -1..1 range: what a hole looks like to Flux Fill and to SD inpainting


@dataclass(frozen=True)
class Sample:
    """Images are float32 [H,W,3] in 0..1, masks float32 [H,W] with 1 = repaint.

    `source` is the picture before an edit (None for inpainting data), `target` the picture to learn,
    `prompt` the instruction (edits) or the caption (inpainting), `caption` the target's description where
    known, `mask` the region that changes or the hole (None where the data has none). `encoded` is set, and
    `target` None, for precomputed data (`precomputed.Encoded`). `literal`: the prompt is not to be put into
    a template. `role` is "instance" or "class" (prior preservation), `weight` multiplies the loss.
    """

    prompt: str
    target: torch.Tensor | None = None
    source: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    caption: str = ""
    task: str = ""
    name: str = ""
    image_path: Path | None = None
    mask_path: Path | None = None
    role: str = "instance"
    literal: bool = False
    weight: float = 1.0
    encoded: object | None = None

    @property
    def image(self) -> torch.Tensor | None:
        """Inpainting's name for the picture to learn."""
        return self.target

    @property
    def prior(self) -> bool:
        """A class picture of prior preservation."""
        return self.role == "class"

    @property
    def masked_image(self) -> torch.Tensor:
        """[H,W,3]: the image with its hole mid-grey."""
        if self.mask is None:
            raise ValueError(f"{self.name or 'sample'} has no mask: draw one with masks.random_masks first")
        keep = 1 - self.mask[..., None]
        return self.target * keep + GREY * (1 - keep)

    @property
    def image_pil(self) -> Image.Image:
        return to_pil(self.target)

    @property
    def mask_pil(self) -> Image.Image:
        """8-bit, white = repaint."""
        return Image.fromarray((self.mask.numpy() * 255).round().astype(np.uint8))


def stamp(*parts: object) -> str:
    """A short hash of whatever identifies a source."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def to_pil(image: torch.Tensor) -> Image.Image:
    """[H,W,3] 0..1 -> RGB."""
    return Image.fromarray((image.detach().cpu().float().clamp(0, 1).numpy() * 255).round().astype(np.uint8))


def open_picture(where, name: str) -> Image.Image:
    """A PIL picture, header read, from a path, bytes, a `datasets` image dict or a PIL picture; BrokenSample
    otherwise.
    """
    if isinstance(where, dict):
        where = where["bytes"] if where.get("bytes") else where.get("path")
    if isinstance(where, Image.Image):
        return where
    if not where:
        raise BrokenSample(name, "the picture is missing")
    try:
        return Image.open(io.BytesIO(where) if isinstance(where, bytes) else where)
    except FileNotFoundError:
        raise BrokenSample(name, f"{where} is missing") from None
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BrokenSample(name, f"not a readable picture ({type(error).__name__})") from error


def read_size(where, name: str) -> tuple[int, int]:
    """(height, width) from the header alone, as the picture will be shown (EXIF orientation applied)."""
    picture = open_picture(where, name)
    width, height = picture.size
    sideways = picture.getexif().get(0x0112, 1) >= 5
    return (width, height) if sideways else (height, width)


def read_image(where, name: str) -> torch.Tensor:
    """float32 [H,W,3] in 0..1, upright; BrokenSample when it cannot be decoded."""
    return torch.from_numpy(np.asarray(_decode(where, name, "RGB"), dtype=np.float32) / 255)


def read_mask(where, name: str, size: tuple[int, int]) -> torch.Tensor:
    """float32 [H,W], white = 1 = repaint, cut at one half, resized (nearest) to the image's `size`."""
    picture = _decode(where, name, "L")
    if picture.size != (size[1], size[0]):
        picture = picture.resize((size[1], size[0]), Image.Resampling.NEAREST)
    return torch.from_numpy((np.asarray(picture) >= 128).astype(np.float32))


def _decode(where, name: str, mode: str) -> Image.Image:
    picture = open_picture(where, name)
    try:
        return ImageOps.exif_transpose(picture).convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenSample(name, f"the picture cannot be decoded ({error})") from error


def fit(sample: Sample, size: tuple[int, int], *, policy: str = "crop") -> Sample:
    """Bring every picture of the sample to (height, width) with one geometry.

    `crop` scales to cover and keeps the centre; `stretch` ignores the aspect ratio, as ICEdit's own training
    does. A source whose size differs from the target's is first stretched onto it, since the two show the
    same frame.
    """
    if policy not in ("crop", "stretch"):
        raise ValueError(f"policy is {policy!r}: use 'crop' or 'stretch'")
    if sample.target is None:
        return sample
    pictures = {"target": sample.target, "source": sample.source, "mask": sample.mask}
    frame = tuple(sample.target.shape[:2])
    return replace(
        sample,
        **{
            name: _fit(picture, frame, size, policy)
            for name, picture in pictures.items()
            if picture is not None
        },
    )


def _fit(picture: torch.Tensor, frame: tuple[int, int], size: tuple[int, int], policy: str) -> torch.Tensor:
    picture = _resize(picture, frame)
    if policy == "stretch":
        return _resize(picture, size)
    scale = max(size[0] / frame[0], size[1] / frame[1])
    picture = _resize(
        picture, tuple(max(want, round(have * scale)) for have, want in zip(frame, size, strict=True))
    )
    top, left = ((have - want) // 2 for have, want in zip(picture.shape[:2], size, strict=True))
    return picture[top : top + size[0], left : left + size[1]].contiguous()


def _resize(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(picture.shape[:2]) == tuple(size):
        return picture
    if picture.ndim == 2:
        return torch.nn.functional.interpolate(picture[None, None], size=size, mode="nearest-exact")[0, 0]
    channels_first = picture.movedim(-1, 0)[None]
    resized = torch.nn.functional.interpolate(channels_first, size=size, mode="bicubic", antialias=True)
    return resized[0].movedim(0, -1).clamp(0, 1).contiguous()
