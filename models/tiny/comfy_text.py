"""The text half of a tiny folder as a comfy.sd.CLIP, around transformers' tokenizers and modules.

Pads and cuts as the diffusers side does (`models/flux_text.py`), so that a prompt gives the same embedding;
on top of it ComfyUI's `(word:1.2)` weights. Imported only at run time. Not for full-size text encoders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import torch
from torch import Tensor, nn

from ..flux_text import T5_TOKENS
from ..model_index import part_class

Weighted = list[list[tuple]]  # batches of (token id, weight) or (token id, weight, word number)


def load_clip(folder: Path):
    """The folder's text encoders as one comfy.sd.CLIP in float32: CLIP and T5, or CLIP alone."""
    tokenizers, t5 = {"l": WeightedTokenizer(_load(folder, "tokenizer"))}, None
    if (folder / "text_encoder_2").is_dir():
        tokenizers["t5xxl"] = WeightedTokenizer(_load(folder, "tokenizer_2"), T5_TOKENS)
        t5 = _load(folder, "text_encoder_2")
    empty = list(tokenizers.values())[-1].ids("")
    tokenizer = TinyTokenizer(**tokenizers)
    model = TextModel(_load(folder, "text_encoder"), t5, empty).eval().requires_grad_(False)
    target = comfy.supported_models_base.ClipTarget(lambda **_: tokenizer, lambda **_: model)
    return comfy.sd.CLIP(target, model_options={"dtype": torch.float32})


def _load(folder: Path, part: str):
    """One transformers component, of the class that the pipeline's model_index.json names."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if part not in index:
        raise ValueError(f"{path} names no {part}: pass a complete diffusers folder")
    loaded = part_class(index, part, str(folder)).from_pretrained(str(folder / part))
    return loaded.float() if isinstance(loaded, nn.Module) else loaded


class WeightedTokenizer:
    """A transformers tokenizer that gives every token a weight; one batch of exactly `length` tokens."""

    def __init__(self, tokenizer: Any, limit: int | None = None):
        self.tokenizer = tokenizer
        self.length = min(limit or tokenizer.model_max_length, tokenizer.model_max_length)
        self.words = {number: word for word, number in tokenizer.get_vocab().items()}
        bare = tokenizer("a", add_special_tokens=False).input_ids
        full = tokenizer("a").input_ids
        start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        self.prefix, self.suffix = full[:start], full[start + len(bare) :]

    def ids(self, text: str) -> list[int]:
        """The padded ids of a text without weights, exactly as the tokenizer itself gives them."""
        return self.tokenizer(text, padding="max_length", max_length=self.length, truncation=True).input_ids

    def specials(self) -> tuple[int | None, int | None]:
        """The ids of the first and the last special token around a text."""
        return (self.prefix[0] if self.prefix else None), (self.suffix[-1] if self.suffix else None)

    def uncut(self, text: str) -> list[tuple]:
        """All tokens of a text as (id, weight, word number from 1), however many; no special ones."""
        parsed = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
        tokens = []
        for word, (segment, weight) in enumerate(parsed, start=1):
            segment = comfy.sd1_clip.unescape_important(segment)
            ids = self.tokenizer(segment, add_special_tokens=False).input_ids
            tokens += [(number, weight, word) for number in ids]
        return tokens

    def __call__(self, text: str, return_word_ids: bool = False) -> Weighted:
        tokens = self.uncut(text)
        room = self.length - len(self.prefix) - len(self.suffix)
        tokens = [*self._special(self.prefix), *tokens[:room], *self._special(self.suffix)]
        tokens += self._special([self.tokenizer.pad_token_id] * (self.length - len(tokens)))
        return [tokens if return_word_ids else [token[:2] for token in tokens]]

    @staticmethod
    def _special(ids: list[int]) -> list[tuple]:
        return [(number, 1.0, 0) for number in ids]


class TinyTokenizer:
    """What comfy.sd.CLIP expects of a tokenizer: a dict with the tokens for each text encoder, "l" first."""

    def __init__(self, **tokenizers: WeightedTokenizer):
        self.tokenizers = tokenizers

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **_: Any
    ) -> dict[str, Weighted]:
        """For each text encoder its tokens, weighted as ComfyUI's prompts say it: `(word:1.2)`."""
        return {name: tokenizer(text, return_word_ids) for name, tokenizer in self.tokenizers.items()}

    def untokenize(self, tokens: list[tuple]) -> list[tuple]:
        """Each token with the word it stands for."""
        words = self.tokenizers["l"].words
        return [(token, words[token[0]]) for token in tokens]

    def state_dict(self) -> dict:
        """Nothing of a tokenizer is saved into a checkpoint."""
        return {}


class TextModel(nn.Module):
    """What comfy.sd.CLIP expects of a text model: a token sequence and a pooled vector.

    FLUX takes the sequence of T5, Stable Diffusion that of CLIP; the pooled vector is CLIP's in both.
    """

    def __init__(self, clip: nn.Module, t5: nn.Module | None, empty: list[int]):
        """empty: ids of the empty prompt for the encoder that gives the sequence."""
        super().__init__()
        self.clip_l = clip
        if t5 is not None:
            self.t5xxl = t5
        self.empty = empty
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: dict) -> None:
        """Layer and projection choices make no sense at this depth; accepted and ignored."""

    def reset_clip_options(self) -> None:
        """Nothing to reset."""

    def load_sd(self, state_dict: dict[str, Tensor]):
        """As `load_state_dict`; returns the missing and the unexpected keys."""
        return self.load_state_dict(state_dict, strict=False)

    def encode_token_weights(self, tokens: dict[str, Weighted]) -> tuple[Tensor, Tensor]:
        """(sequence [1, L, D], pooled [1, P]); weights scale the distance to the empty prompt's embedding."""
        pooled = self.clip_l(self._ids(tokens["l"][0])).pooler_output
        name = "t5xxl" if hasattr(self, "t5xxl") else "l"
        encoder = self.t5xxl if name == "t5xxl" else self.clip_l
        sequence = encoder(self._ids(tokens[name][0])).last_hidden_state
        weights = torch.tensor([token[1] for token in tokens[name][0]], device=sequence.device)
        if (weights != 1.0).any():
            empty = encoder(self._ids([(number,) for number in self.empty])).last_hidden_state
            sequence = torch.lerp(empty, sequence, weights[None, :, None])
        return sequence.float(), pooled.float()

    def _ids(self, tokens: list[tuple]) -> Tensor:
        device = next(self.parameters()).device
        return torch.tensor([[token[0] for token in tokens]], dtype=torch.long, device=device)
