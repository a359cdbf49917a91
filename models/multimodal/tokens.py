"""Texts to token ids for the text encoder and the text decoder; a tokenizer for a small world of words."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

logger = logging.getLogger(__name__)


def word_tokenizer(words: Sequence[str]):
    """A `PreTrainedTokenizerFast` with a token for each word, framed as BERT's; the case of letters is lost.

    Decoding gives back a text of known words exactly, punctuation included; other words become [UNK].
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces = ["\u2581", ",", ".", "-", "'", *(f"\u2581{word}" for word in sorted({w.lower() for w in words}))]
    scored = [(piece, 0.0) for piece in special] + [(piece, -2.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=1))
    split = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        clean_up_tokenization_spaces=False,
    )


def end_id(tokenizer: Any) -> int:
    """The token that ends a caption: GPT-2's end of text, or BERT's [SEP]."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def check_texts(name: str, texts: str | Sequence[str]) -> list[str]:
    """A list of strings. Raises ValueError for an empty list or anything that is no string."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is {texts!r}: give a string or a list with at least one string")
    return texts


def text_ids(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both int64 [B,L], framed by the tokenizer's own special tokens."""
    _warn_if_cut(tokenizer(list(texts)).input_ids, max_tokens)
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def caption_ids(tokenizer: Any, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both int64 [B,L]: the words and the token that ends them, padded on the right."""
    end = end_id(tokenizer)
    rows = [[*ids, end] for ids in tokenizer(list(captions), add_special_tokens=False).input_ids]
    _warn_if_cut(rows, max_tokens)
    cut = [torch.tensor([*row[: max_tokens - 1], end]) for row in (row[:-1] for row in rows)]
    ids = pad_sequence(cut, batch_first=True, padding_value=end)
    mask = pad_sequence([torch.ones_like(row) for row in cut], batch_first=True)
    return ids, mask


def _warn_if_cut(rows: Sequence[Sequence[int]], max_tokens: int) -> None:
    longest = max(map(len, rows))
    if longest > max_tokens:
        logger.warning(
            "the longest text has %d tokens; the last %d are cut off", longest, longest - max_tokens
        )
