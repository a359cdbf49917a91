"""One training example, whatever it was read from: its images on disk and in memory.

Those that cannot be read are skipped, counted and named at the end; more than 5 % stop with the list.

Not for layouts of datasets (`sources.py` and its neighbours) or batching (`buckets.py`), nor for errors that
concern a whole dataset (a missing column, an empty folder), which are ValueErrors at opening.
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

GREY = 0.5  # 0 in the models' -1..1 range: what a hole looks like to Flux Fill and to SD inpainting
LISTED = 20  # broken examples that are named
LARGEST = 2**24  # pixels of a training image in memory, 4096 x 4096: more than any resolution trained at


class BrokenSample(ValueError):
    """One unreadable example: `name` says which, `reason` why. Sources raise it, `Broken` counts it."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):
        # Exceptions cross DataLoader workers by pickle, which would call __init__ with the one message only.
        return type(self), (self.name, self.reason)


class Broken:
    """The broken examples of one dataset of `total` examples.

    More than `limit` (a fraction) of the dataset broken is a ValueError with the list: from `close`, so
    that the list is complete, or from `record` as soon as the list is longer than a person would read.
    """

    def __init__(self, total: int, limit: float = 0.05):
        if total < 1:
            raise ValueError(
                f"the dataset holds {total} examples: point the data option at a folder with data"
            )
        self.total, self.limit = total, limit
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def record(self, error: BrokenSample) -> None:
        """Count one broken example (once, however often it is met)."""
        self.reasons.setdefault(error.name, error.reason)
        if len(self) > LISTED:
            self.close()

    def close(self) -> str:
        """One sentence for the end of a run, empty when nothing was broken."""
        if len(self) > self.limit * self.total:
            raise ValueError(
                f"{len(self)} of {self.total} examples are broken, more than {self.limit:.0%}: "
                f"repair or remove them ({self._list()})"
            )
        if not self.reasons:
            return ""
        return f"{len(self)} of {self.total} examples were broken and skipped: {self._list()}"

    def _list(self) -> str:
        items = [f"{name}: {reason}" for name, reason in list(self.reasons.items())[:LISTED]]
        if len(self) > LISTED:
            items.append(f"and {len(self) - LISTED} more")
        return "; ".join(items)


@dataclass(frozen=True)
class Sample:
    """Images are float32 [H,W,3] in 0..1, masks float32 [H,W] with 1 = repaint.

    `source` is the image before an edit (None for inpainting data), `target` the image to learn (the same
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
        """Inpainting's name for the image to learn."""
        return self.target

    @property
    def prior(self) -> bool:
        """A class image of prior preservation."""
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
        """The image to learn, 8 bits."""
        return to_pil(self.target)

    @property
    def mask_pil(self) -> Image.Image:
        """8-bit, white = repaint."""
        return to_pil(self.mask)


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
    """Bring every image and mask of the sample to (height, width) with one geometry.

    `crop` scales to cover and keeps the centre; `stretch` ignores the aspect ratio, as ICEdit's own training
    does. A source whose size differs from the target's is first stretched onto it, since the two show the
    same frame.
    """
    if policy not in ("crop", "stretch"):
        raise ValueError(f"policy is {policy!r}: use 'crop' or 'stretch'")
    if sample.target is None:
        return sample
    images = {"target": sample.target, "source": sample.source, "mask": sample.mask}
    frame = tuple(sample.target.shape[:2])
    there = {name: image for name, image in images.items() if image is not None}
    return replace(sample, **{name: _fit(image, frame, size, policy) for name, image in there.items()})


def _fit(image: torch.Tensor, frame: tuple[int, int], size: tuple[int, int], policy: str) -> torch.Tensor:
    """An image [H,W,3] or mask [H,W] that shows `frame`, cut before it is resized: a thin one stays small."""
    fit = geometry.place(frame, size, policy)
    if image.ndim == 2:
        return pixels.fit_mask(pixels.resize_mask(image[None], *frame), fit)[0].contiguous()
    return pixels.fit_image(pixels.resize_image(image[None], *frame), fit)[0].contiguous()
