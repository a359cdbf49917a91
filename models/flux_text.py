"""Prompts to FLUX text embeddings: the pooled CLIP vector and the T5 token sequence.

Shared by Fill and Kontext. Not for ComfyUI, whose own CLIP object encodes there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from .denoiser import TextEmbedding

T5_TOKENS = 512

logger = logging.getLogger(__name__)


def _token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> torch.Tensor:
    batch = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return batch.input_ids


def _home(module: torch.nn.Module) -> torch.device:
    """Where a module wants its input: under accelerate's offload hooks the weights lie on another device."""
    hook = getattr(module, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or next(module.parameters()).device)


class FluxText:
    """The text parts of a FLUX folder: CLIP (`tokenizer`, `text_encoder`) and T5 (`tokenizer_2`, ...)."""

    def __init__(self, tokenizer: Any, text_encoder: Any, tokenizer_2: Any, text_encoder_2: Any):
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.tokenizer_2 = tokenizer_2
        self.text_encoder_2 = text_encoder_2

    @property
    def max_tokens(self) -> int:
        """T5 sequence length: 512 as FLUX was trained, or the tokenizer's own limit where that is shorter."""
        return min(T5_TOKENS, self.tokenizer_2.model_max_length)

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str], max_tokens: int | None = None) -> TextEmbedding:
        """Encode prompts (padded and cut to the token limits, no attention mask, as FLUX was trained).

        Returns tokens [B, max_tokens, D] and pooled [B, P] in the encoders' dtypes.
        Raises ValueError for an empty list or a prompt that is not a string.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts is {prompts!r}: pass a string or a non-empty list of strings")
        max_tokens = max_tokens or self.max_tokens
        longest = max(len(ids) for ids in self.tokenizer_2(prompts).input_ids)
        if longest > max_tokens:
            logger.warning("the prompt has %d tokens; the last %d are cut off", longest, longest - max_tokens)
        clip_ids = _token_ids(self.tokenizer, prompts, self.tokenizer.model_max_length)
        t5_ids = _token_ids(self.tokenizer_2, prompts, max_tokens)
        pooled = self.text_encoder(clip_ids.to(_home(self.text_encoder))).pooler_output
        tokens = self.text_encoder_2(t5_ids.to(_home(self.text_encoder_2)))[0]
        return TextEmbedding(tokens=tokens, pooled=pooled.to(tokens.dtype))
