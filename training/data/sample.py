"""One training example, whatever it was read from. Not for reading files (`sources.py`) or batching (`buckets.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Sample:
    """Images are float32 [H,W,3] in 0..1, masks float32 [H,W] with 1 = repaint.

    `source` is the picture before an edit (None for inpainting), `target` the picture to learn, `prompt` the instruction
    (edits) or the caption (inpainting), `mask` the region that changes, None where the data has none.
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
    weight: float = 1.0
    encoded: object | None = None


def fit(sample: Sample, size: tuple[int, int]) -> Sample:
    """Scale to cover (height, width) and crop the centre: one geometry for source, target and mask."""
    raise NotImplementedError
