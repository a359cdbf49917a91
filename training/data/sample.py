"""One training example, whatever it was read from, and its images on disk and in memory.

Not for data set layouts (`sources.py` and its neighbours) or batching (`buckets.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from ...models import geometry, image_files, pixels
from ...models.image_files import to_pil
from .broken import BrokenSample

GREY = 0.5  # 0 in the models' -1..1 range: what a hole looks like to Flux Fill and to SD inpainting
LARGEST = 2**24  # pixels of a training image in memory, 4096 x 4096: more than any resolution trained at


@dataclass(frozen=True)
class Sample:
    """Images are float32 [H,W,3] in 0..1, masks float32 [H,W] with 1 = repaint.

    `source` is the picture before an edit (None for inpainting data), `target` the picture to learn (the same
    object where there is none yet: data for reward training),
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
        return to_pil(self.mask)


def read_size(where, name: str) -> tuple[int, int]:
    """(height, width) of an image as it is shown, from its header. Raises BrokenSample."""
    with _named(name):
        return image_files.image_size(where)


def read_image(where, name: str) -> torch.Tensor:
    """An image as float32 [H,W,3] in 0..1, transparent pixels white; made smaller beyond `LARGEST` pixels.

    Raises BrokenSample.
    """
    with _named(name):
        return image_files.read_image(where, most=LARGEST)


def read_mask(where, name: str, size: tuple[int, int]) -> torch.Tensor:
    """A mask of 0 and 1, float32 [H,W] of the image's `size`, 1 = repaint, cut at one half.

    See `image_files.read_mask`. Raises BrokenSample.
    """
    with _named(name):
        mask = image_files.read_mask(where, most=LARGEST)
    return pixels.binarise(pixels.resize_mask(mask[None], *size))[0]


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except image_files.ImageFileError as error:
        raise BrokenSample(name, str(error)) from error


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
    """An image [H,W,3] or mask [H,W] that shows `frame`, cut before it is resized: a thin one stays small."""
    fit = geometry.place(frame, size, policy)
    if picture.ndim == 2:
        return pixels.fit_mask(pixels.resize_mask(picture[None], *frame), fit)[0].contiguous()
    return pixels.fit_image(pixels.resize_image(picture[None], *frame), fit)[0].contiguous()
