"""The text half of a tiny FLUX folder as a comfy.sd.CLIP, around transformers' tokenizers and modules.

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

Weighted = list[list[tuple]]  # batches of (token id, weight) or (token id, weight, word number)


def load_clip(folder: Path):
    """CLIP and T5 of the folder as one comfy.sd.CLIP in float32."""
    clip_ids = WeightedTokenizer(_load(folder, "tokenizer"))
    t5_ids = WeightedTokenizer(_load(folder, "tokenizer_2"), T5_TOKENS)
    tokenizer = FluxTokenizer(clip_ids, t5_ids)
    model = FluxTextModel(_load(folder, "text_encoder"), _load(folder, "text_encoder_2"), t5_ids.ids(""))
    model.eval().requires_grad_(False)
    target = comfy.supported_models_base.ClipTarget(lambda **_: tokenizer, lambda **_: model)
    return comfy.sd.CLIP(target, model_options={"dtype": torch.float32})


def _load(folder: Path, part: str):
    """One transformers component, of the class that the pipeline's model_index.json names."""
    import transformers

    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if part not in index:
        raise ValueError(f"{path} names no {part}: pass a complete diffusers FLUX folder")
    loaded = getattr(transformers, index[part][1]).from_pretrained(str(folder / part))
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

    def __call__(self, text: str, return_word_ids: bool = False) -> Weighted:
        parsed = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
        tokens = []
        for word, (segment, weight) in enumerate(parsed, start=1):
            segment = comfy.sd1_clip.unescape_important(segment)
            ids = self.tokenizer(segment, add_special_tokens=False).input_ids
            tokens += [(number, weight, word) for number in ids]
        room = self.length - len(self.prefix) - len(self.suffix)
        tokens = [*self._special(self.prefix), *tokens[:room], *self._special(self.suffix)]
        tokens += self._special([self.tokenizer.pad_token_id] * (self.length - len(tokens)))
        return [tokens if return_word_ids else [token[:2] for token in tokens]]

    @staticmethod
    def _special(ids: list[int]) -> list[tuple]:
        return [(number, 1.0, 0) for number in ids]


class FluxTokenizer:
    """What comfy.sd.CLIP expects of a FLUX tokenizer: a dict with the CLIP ("l") and T5 ("t5xxl") tokens."""

    def __init__(self, clip: WeightedTokenizer, t5: WeightedTokenizer):
        self.clip = clip
        self.t5 = t5

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **_: Any
    ) -> dict[str, Weighted]:
        return {"l": self.clip(text, return_word_ids), "t5xxl": self.t5(text, return_word_ids)}

    def untokenize(self, tokens: list[tuple]) -> list[tuple]:
        return [(token, self.clip.words[token[0]]) for token in tokens]

    def state_dict(self) -> dict:
        return {}


class FluxTextModel(nn.Module):
    """What comfy.sd.CLIP expects of a FLUX text model: T5 token embeddings and the pooled CLIP vector."""

    def __init__(self, clip: nn.Module, t5: nn.Module, empty_t5: list[int]):
        super().__init__()
        self.clip_l = clip
        self.t5xxl = t5
        self.empty_t5 = empty_t5
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: dict) -> None:
        """Layer and projection choices have no meaning for FLUX's pooled vector; accepted and ignored."""

    def reset_clip_options(self) -> None:
        """Nothing to reset."""

    def load_sd(self, state_dict: dict[str, Tensor]):
        return self.load_state_dict(state_dict, strict=False)

    def encode_token_weights(self, tokens: dict[str, Weighted]) -> tuple[Tensor, Tensor]:
        """(sequence [1, L, D], pooled [1, P]); weights scale the distance to the empty prompt's embedding."""
        pooled = self.clip_l(self._ids(tokens["l"][0])).pooler_output
        sequence = self.t5xxl(self._ids(tokens["t5xxl"][0]))[0]
        weights = torch.tensor([token[1] for token in tokens["t5xxl"][0]], device=sequence.device)
        if (weights != 1.0).any():
            empty = self.t5xxl(self._ids([(number,) for number in self.empty_t5]))[0]
            sequence = torch.lerp(empty, sequence, weights[None, :, None])
        return sequence.float(), pooled.float()

    def _ids(self, tokens: list[tuple]) -> Tensor:
        device = next(self.parameters()).device
        return torch.tensor([[token[0] for token in tokens]], dtype=torch.long, device=device)
