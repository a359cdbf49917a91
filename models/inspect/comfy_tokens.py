"""Tokens of a prompt out of ComfyUI's CLIP objects, or out of the FLUX tokenizers that ComfyUI brings.

Imported only at run time, from a node.
"""

from __future__ import annotations

from typing import Any

from ..flux_text import T5_TOKENS
from . import tokens

NAMES = {"l": "CLIP-L", "g": "CLIP-G", "h": "CLIP-H", "t5xxl": "T5"}
UNLIMITED = 10**6  # ComfyUI writes a huge maximum where it sets none


def read(clip: Any | None, text: str) -> list[tokens.Encoded]:
    """What each text encoder of a comfy.sd.CLIP gets of a prompt, `(word:1.2)` weights included.

    Without a CLIP: FLUX's pair of tokenizers, which ComfyUI brings itself. Where CLIP stands beside T5 (FLUX)
    only its first chunk is read: the pooled vector is that chunk's.
    """
    if clip is None:
        from comfy.text_encoders.flux import FluxTokenizer

        tokenizer = FluxTokenizer()
        chunks = tokenizer.tokenize_with_weights(text, return_word_ids=True)
    else:
        tokenizer = clip.tokenizer
        chunks = clip.tokenize(text, return_word_ids=True)
    return [_encoded(name, part, _part(tokenizer, name), text, set(chunks)) for name, part in chunks.items()]


def _part(tokenizer: Any, name: str) -> Any:
    """The tokenizer of one encoder: ours hold them in a dict, ComfyUI's as attributes; None if not found."""
    ours = getattr(tokenizer, "tokenizers", None)
    if isinstance(ours, dict) and name in ours:
        return ours[name]
    for attribute in (name, f"clip_{name}", getattr(tokenizer, "clip", None)):
        if isinstance(attribute, str) and hasattr(tokenizer, attribute):
            return getattr(tokenizer, attribute)
    return None


def _encoded(name: str, chunks: list[list[tuple]], part: Any, text: str, all_names: set) -> tokens.Encoded:
    ours = hasattr(part, "uncut")
    start, end = (
        part.specials() if ours else (getattr(part, f"{end}_token", None) for end in ("start", "end"))
    )
    vocabulary = getattr(part, "words" if ours else "inv_vocab", {})

    def piece(token: object) -> str:
        return vocabulary.get(token, str(token)) if isinstance(token, int) else "(embedding)"

    limit = _limit(name, part)
    reads_all = not (name == "l" and all_names == {"l", "t5xxl"})
    rows = tokens.kinds(
        chunks, piece, start=start, end=end, limit=limit if name == "t5xxl" else None, reads_all=reads_all
    )
    kept = sum(bool(token[2]) for chunk in chunks for token in chunk)
    rest = part.uncut(text)[kept:] if ours else []
    dropped = tuple(tokens.Token(token[0], piece(token[0]), float(token[1]), tokens.CUT) for token in rest)
    return tokens.Encoded(NAMES.get(name, name), rows, dropped, limit, reads_all)


def _limit(name: str, part: Any) -> int | None:
    """Positions that the model was trained with: the tokenizer's own maximum, or T5's 512."""
    own = getattr(part, "length", None) or getattr(part, "max_length", None)
    if own is not None and own < UNLIMITED:
        return own
    return T5_TOKENS if name == "t5xxl" else None
