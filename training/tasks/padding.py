"""Text padding by arithmetic, for text encoders to which all padding is alike (the bundled tiny ones).

FLUX gives text tokens no positions and its pipelines pass no attention mask, so n equal pads act in every
attention as one pad whose logit has log n added. A batch then needs one pad instead of hundreds, and can
stand for any padded length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_alike(tokens: Tensor, words: Tensor) -> None:
    """Raise ValueError if the pads, tokens [B,L,D] from position words [B] on, are not all alike."""
    for row, count in zip(tokens, words.tolist(), strict=True):
        pads = row[count:]
        if len(pads) and (pads - pads[:1]).abs().max() > 0.01 * pads.abs().max():
            raise ValueError(
                "text_lengths is set but this text encoder's padding depends on its place: leave it empty"
            )


def merged(tokens: Tensor, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [B,S,D], attention bias [B,S] float32) that stand for prompts padded to `lengths` [B].

    tokens: [B,L,D] with pads from position words [B] on; S is the longest prompt and one pad, at most L.
    A prompt that fills its length counts as having one pad where S leaves it room.
    """
    size = min(int(words.max()) + 1, tokens.shape[1])
    room, pads = size - words, (lengths - words).clamp_min(1)
    weight = (pads / room.clamp_min(1)).log()
    is_pad = torch.arange(size, device=tokens.device) >= words[:, None]
    return tokens[:, :size], torch.where(is_pad, weight[:, None], 0.0).float()
