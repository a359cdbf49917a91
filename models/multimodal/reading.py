"""Which words of a prompt a model knows, said in sentences to whoever wrote it. Not for training."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from .tokens import check_texts

LISTED = 120  # known words that a sentence names; the thirty thousand of a full BERT it does not


def words(text: str) -> list[str]:
    """The words of a text, each once, without punctuation around them."""
    bare = (word.strip(string.punctuation) for word in text.split())
    return list(dict.fromkeys(word for word in bare if word))


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """Those words of a text that the tokenizer has no tokens for, each once, in their order."""
    unknown = tokenizer.unk_token_id
    return [word for word in words(text) if unknown in tokenizer(word, add_special_tokens=False).input_ids]


def read_words(tokenizer: Any, text: str) -> list[str]:
    """Those words of a text that the tokenizer knows, each once, in their order."""
    unknown = unknown_words(tokenizer, text)
    return [word for word in words(text) if word not in unknown]


def known_words(tokenizer: Any) -> list[str]:
    """Every word of a small vocabulary, sorted; [] for one of more than `LISTED` words."""
    pieces = (piece.lstrip("\u2581") for piece in tokenizer.get_vocab())
    known = sorted({piece for piece in pieces if piece.isalpha()})
    return known if len(known) <= LISTED else []


def remarks(model: Any, prompts: str | Sequence[str]) -> list[str]:
    """What a model does not read of prompts, a sentence for each such prompt: unknown words, a cut-off end.

    model: a `GenerativeMultimodalModel`. Raises ValueError for a prompt of which it knows no word.
    """
    tokenizer, limit = model.tokenizer, model.architecture.max_tokens
    told = []
    for prompt in check_texts("prompts", prompts):
        unknown = unknown_words(tokenizer, prompt)
        read = read_words(tokenizer, prompt)
        if not read:
            raise ValueError(f"prompt {prompt!r} has no word that this model knows{_knows(tokenizer)}")
        if unknown:
            told.append(
                f"{prompt!r}: not known {', '.join(unknown)}; read {' '.join(read)}{_knows(tokenizer)}"
            )
        if (over := len(tokenizer(prompt).input_ids) - limit) > 0:
            told.append(f"{prompt!r}: its last {over} tokens are cut off, the model reads {limit}")
    return told


def _knows(tokenizer: Any) -> str:
    known = known_words(tokenizer)
    return f"; it knows {', '.join(known)}" if known else "; use words of its training captions"
