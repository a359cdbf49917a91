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
    same: Tensor  # [B,B] which prompts are equal
    foreground: Tensor | None  # [B,1,S,S] what the reconstruction has to get right above all


def make_pairs(
    pixels: Tensor,
    captions: Sequence[str],
    prompts: Sequence[str],
    tokenizer: Any,
    caption_tokenizer: Any,
    max_tokens: int,
    even_ground: bool,
) -> Pairs:
    """A batch of pixels [B,3,S,S] in -1..1, B captions, to be written, and B prompts, to be read.

    Raises ValueError for other counts.
    """
    for name, texts in {"captions": captions, "prompts": prompts}.items():
        if len(texts) != len(pixels):
            raise ValueError(f"{name} are {len(texts)} but images {len(pixels)}: give one each")
    batch = (
        *text_ids(tokenizer, prompts, max_tokens),
        *caption_ids(caption_tokenizer, captions, max_tokens),
        same_captions(prompts),
    )
    mask = foreground(pixels) if even_ground else None
    return Pairs(pixels, *(tensor.to(pixels.device) for tensor in batch), mask)
