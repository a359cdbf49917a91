"""A training batch: images and their captions as the losses take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .losses import foreground, same_captions
from .tokens import caption_ids, text_ids


class Pairs(NamedTuple):
    """Images and their captions as the losses take them; made by `GenerativeMultimodalModel.pairs`."""

    pixels: Tensor  # [B,3,S,S] in -1..1
    input_ids: Tensor  # [B,L] for the text encoder
    attention_mask: Tensor  # [B,L]
    caption_ids: Tensor  # [B,M] for the text decoder
    caption_mask: Tensor  # [B,M]
    same: Tensor  # [B,B] which captions are equal
    foreground: Tensor | None  # [B,1,S,S] what the reconstruction has to get right above all


def make_pairs(
    pixels: Tensor,
    captions: Sequence[str],
    tokenizer: Any,
    caption_tokenizer: Any,
    max_tokens: int,
    even_ground: bool,
) -> Pairs:
    """A batch of pixels [B,3,S,S] in -1..1 and B captions on one device. Raises ValueError for others."""
    if len(captions) != len(pixels):
        raise ValueError(f"captions are {len(captions)} but images {len(pixels)}: give one caption each")
    batch = (
        *text_ids(tokenizer, captions, max_tokens),
        *caption_ids(caption_tokenizer, captions, max_tokens),
        same_captions(captions),
    )
    mask = foreground(pixels) if even_ground else None
    return Pairs(pixels, *(tensor.to(pixels.device) for tensor in batch), mask)
