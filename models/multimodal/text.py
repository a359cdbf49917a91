"""Texts to embeddings (BERT) and embeddings to texts (GPT-2 behind a projected prefix), on token ids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .tokens import end_id


class TextEncoder(nn.Module):
    """Token ids to embeddings [B,512] of length sqrt(512): BERT, averaged over the tokens of the mask."""

    def __init__(self, bert: Any, embed_dim: int = 512):
        """bert: a transformers `BertModel`, without its pooling layer."""
        super().__init__()
        self.bert = bert
        self.projection = nn.Linear(bert.config.hidden_size, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Both [B,L]; the mask is 1 on tokens and 0 on padding, which then changes nothing.

        Raises ValueError for a mask that is missing, of another shape, or empty in a row.
        """
        if attention_mask is None or attention_mask.shape != input_ids.shape:
            found = None if attention_mask is None else tuple(attention_mask.shape)
            raise ValueError(
                f"attention_mask is {found} but input_ids is {tuple(input_ids.shape)}: "
                "give the mask that the tokenizer returned with the ids"
            )
        if not bool(attention_mask.any(dim=1).all()):
            raise ValueError("attention_mask is 0 in a whole row: give every text at least one token")
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.to(states)[..., None]
        return self.norm(self.projection((states * weights).sum(1) / weights.sum(1)))


class TextDecoder(nn.Module):
    """Image embeddings [B,512] to captions: GPT-2, with the embedding as a prefix of a few vectors."""

    def __init__(self, gpt2: Any, embed_dim: int = 512, prefix_tokens: int = 4, max_tokens: int = 64):
        """gpt2: a transformers `GPT2LMHeadModel` whose configuration names the token that ends a text.

        Raises ValueError if it has too few positions for prefix and text.
        """
        super().__init__()
        config = gpt2.config
        if config.n_positions < prefix_tokens + max_tokens:
            raise ValueError(
                f"GPT-2 has {config.n_positions} positions but prefix and caption need "
                f"{prefix_tokens} + {max_tokens}: lower max_tokens"
            )
        self.gpt2 = gpt2
        self.max_tokens = max_tokens
        self.prefix_shape = (prefix_tokens, config.n_embd)
        self.projection = nn.Linear(embed_dim, prefix_tokens * config.n_embd)

    def prefix(self, image_embeddings: Tensor) -> Tensor:
        """[B,512] to the input vectors [B,4,width] that stand before the first token."""
        return self.projection(image_embeddings).unflatten(1, self.prefix_shape)

    def forward(self, image_embeddings: Tensor, input_ids: Tensor) -> Tensor:
        """Logits [B,L,V] of a caption's tokens: position i has seen the image and the tokens before i.

        Padding may only stand on the right, where nothing before can see it.
        """
        words = self.gpt2.get_input_embeddings()(input_ids[:, :-1])
        inputs = torch.cat([self.prefix(image_embeddings), words], dim=1)
        return self.gpt2(inputs_embeds=inputs).logits[:, self.prefix_shape[0] - 1 :]

    @torch.no_grad()
    def generate(
        self,
        image_embeddings: Tensor,
        *,
        num_captions: int = 1,
        temperature: float = 0.0,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        max_new_tokens: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """New token ids [B * num_captions, L], the captions of an image side by side.

        temperature 0 takes the likeliest token, and all captions of an image are the same; top_k 0 and
        top_p 1 leave every token in. With a seed torch's own random state stays as it was. Raises
        ValueError for a number out of range.
        """
        from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

        limit = self.max_tokens if max_new_tokens is None else max_new_tokens
        for name, value, fits, allowed in (
            ("num_captions", num_captions, num_captions >= 1, "at least 1"),
            ("temperature", temperature, 0 <= temperature < math.inf, "0 (the likeliest token) or more"),
            ("top_k", top_k, top_k >= 0, "0 (every token) or more"),
            ("top_p", top_p, 0 < top_p <= 1, "a number above 0, up to 1 (every token)"),
            (
                "repetition_penalty",
                repetition_penalty,
                0 < repetition_penalty < math.inf,
                "above 0; 1 is none",
            ),
            ("max_new_tokens", limit, 1 <= limit <= self.max_tokens, f"1 to {self.max_tokens}"),
        ):
            if not fits:
                raise ValueError(f"{name} is {value}: give {allowed}")
        prefix = self.prefix(image_embeddings)
        options: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
            options["num_return_sequences"] = num_captions
        if repetition_penalty != 1:  # by keyword, transformers warns that the prefix has no ids to penalise
            penalty = RepetitionPenaltyLogitsProcessor(float(repetition_penalty))
            options["logits_processor"] = LogitsProcessorList([penalty])
        devices = [prefix.device] if prefix.is_cuda else []
        with torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            ids = self.gpt2.generate(
                inputs_embeds=prefix,
                attention_mask=prefix.new_ones(prefix.shape[:2], dtype=torch.long),
                max_new_tokens=limit,
                eos_token_id=self.gpt2.config.eos_token_id,
                pad_token_id=self.gpt2.config.eos_token_id,
                **options,
            )
        return ids if temperature > 0 else ids.repeat_interleave(num_captions, dim=0)


def fresh_bert(sizes: Mapping[str, Any], tokenizer: Any) -> Any:
    """An untrained `BertModel` that knows the tokenizer's vocabulary; sizes: keys of `BertConfig`."""
    from transformers import BertConfig, BertModel

    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return BertModel(BertConfig.from_dict({**vocabulary, **sizes}), add_pooling_layer=False)


def fresh_gpt2(sizes: Mapping[str, Any], tokenizer: Any) -> Any:
    """An untrained `GPT2LMHeadModel` that knows the tokenizer's vocabulary; sizes: keys of `GPT2Config`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    end = end_id(tokenizer)
    vocabulary = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end}
    return GPT2LMHeadModel(GPT2Config.from_dict({**vocabulary, **sizes}))
