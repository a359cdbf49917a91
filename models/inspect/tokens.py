"""The tokens that text encoders get of a prompt: what each is, what was cut off, where padding begins.

Plain data and its drawing; `comfy_tokens.py` reads it out of a CLIP object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from . import drawing

START, TEXT, END, PADDING, BEYOND, CUT = "start", "text", "end", "padding", "beyond", "cut"
GROUNDS = {
    START: (212, 222, 240),
    TEXT: (226, 240, 224),
    END: (212, 222, 240),
    PADDING: (236, 236, 234),
    BEYOND: (250, 222, 180),
    CUT: (246, 204, 200),
}
MOST_CELLS = 640  # of text tokens that are drawn one by one


@dataclass(frozen=True)
class Token:
    """One position: its number in the vocabulary (None for an embedding), its piece, weight and kind."""

    id: int | None
    piece: str
    weight: float
    kind: str


@dataclass(frozen=True)
class Encoded:
    """What one text encoder gets: `chunks` of tokens, and what its tokenizer dropped.

    limit: positions of one sequence as the model was trained (77 CLIP, 512 T5), special tokens included; None
    where it is not known. reads_all: whether chunks after the first reach the model.
    """

    name: str
    chunks: tuple[tuple[Token, ...], ...]
    dropped: tuple[Token, ...] = ()
    limit: int | None = None
    reads_all: bool = True

    @property
    def tokens(self) -> list[Token]:
        """All positions, chunk after chunk."""
        return [token for chunk in self.chunks for token in chunk]

    @property
    def text(self) -> int:
        """How many tokens the prompt itself has, those that were dropped included."""
        return sum(token.kind in (TEXT, BEYOND) for token in self.tokens) + len(self.dropped)

    @property
    def padding_begins(self) -> int | None:
        """The first padding position, counted through all chunks from 0; None without padding at the end."""
        kinds = [token.kind for token in self.tokens]
        last = max((i for i, kind in enumerate(kinds) if kind != PADDING), default=-1) + 1
        return last if last < len(kinds) else None

    @property
    def lost(self) -> list[Token]:
        """Text tokens that do not do their full part: dropped, or beyond what the model reads."""
        return [token for token in self.tokens if token.kind == BEYOND] + list(self.dropped)


def kinds(
    chunks: Sequence[Sequence[tuple]],
    piece: Callable[[object], str],
    *,
    start: int | None,
    end: int | None,
    limit: int | None = None,
    reads_all: bool = True,
) -> tuple[tuple[Token, ...], ...]:
    """Chunks of (id, weight, word number; 0 = no word) as tokens with their kinds.

    Text is `beyond` in a later chunk that the model does not read (reads_all False), or at a position at
    which no text fits into `limit` with its end token.
    """
    found = []
    for number, chunk in enumerate(chunks):
        row: list[Token] = []
        for position, (token, weight, word) in enumerate(chunk):
            seen = {entry.kind for entry in row}
            if word:
                late = limit is not None and position >= limit - (end is not None)
                kind = BEYOND if late or (number and not reads_all) else TEXT
            elif token == start and not seen:
                kind = START
            elif token == end and END not in seen and not (start is None and PADDING in seen):
                kind = END
            else:
                kind = PADDING
            row.append(Token(token if isinstance(token, int) else None, piece(token), float(weight), kind))
        found.append(tuple(row))
    return tuple(found)


def _spelled(tokens: Sequence[Token]) -> str:
    text = "".join(t.piece.replace("</w>", " ").replace("\u2581", " ") for t in tokens)
    text = " ".join(text.split())
    return text if len(text) <= 120 else f"{text[:58]} ... {text[-58:]}"


def warning(encoders: Sequence[Encoded]) -> str:
    """One sentence for each encoder that misses a part of the prompt; empty where none does."""
    found = []
    for encoder in encoders:
        if not encoder.lost:
            continue
        count, what = len(encoder.lost), _spelled(encoder.lost)
        those = f"the last {count} of {encoder.text} tokens" if count < encoder.text else "all tokens"
        if encoder.dropped:
            said = f"were cut off: {what!r}"
        elif not encoder.reads_all:
            said = f"stand in a later chunk, which this model's pooled vector does not read: {what!r}"
        else:
            said = (
                f"are beyond the {encoder.limit} positions the model was trained with (ComfyUI passes them "
                f"on, diffusers cuts them): {what!r}"
            )
        found.append(f"{encoder.name}: {those} {said}.")
    if found:
        found.append("Put the instruction first, or make the prompt shorter.")
    return " ".join(found)


def summary(encoder: Encoded) -> str:
    """One line on an encoder: positions, the prompt's tokens, where padding begins."""
    sizes = " + ".join(str(len(chunk)) for chunk in encoder.chunks)
    padding = encoder.padding_begins
    room = f" of {encoder.limit}" if encoder.limit else ""
    return (
        f"{encoder.name}: {sizes} positions{f' (trained with {encoder.limit})' if room else ''}, "
        f"{encoder.text} tokens of text, "
        + (f"padding from position {padding}" if padding is not None else "no padding at the end")
        + (f", {len(encoder.dropped)} cut off" if encoder.dropped else "")
    )


def report(encoders: Sequence[Encoded]) -> str:
    """The tables as text: a line on each encoder, then a line for each position; padding in one line."""
    lines = []
    for encoder in encoders:
        lines.append(summary(encoder))
        padding = encoder.padding_begins
        for position, token in enumerate(encoder.tokens[:padding]):
            weight = "" if token.weight == 1.0 else f"  weight {token.weight:.3g}"
            number = "-" if token.id is None else token.id
            lines.append(f"  {position:4d}  {number:>6}  {token.kind:8}{token.piece}{weight}")
        if padding is not None:
            last = encoder.tokens[-1]
            lines.append(f"  {padding:4d} to {len(encoder.tokens) - 1}  {last.id:>6}  padding {last.piece}")
        lines += [f"   cut  {token.id!s:>6}  {token.kind:8}{token.piece}" for token in encoder.dropped]
    told = warning(encoders)
    return "\n".join([*lines, f"WARNING {told}" if told else "Nothing is cut off."])


def image(encoders: Sequence[Encoded], prompt: str) -> Tensor:
    """The tables as IMAGE [1,H,960,3]: every position as a square, every token of text as a cell."""
    short = prompt if len(prompt) <= 400 else f"{prompt[:397]}..."
    bands = [drawing.words(f'"{short}"', 16)]
    if told := warning(encoders):
        bands.append(drawing.words(told, 14, drawing.RED))
    for encoder in encoders:
        shown = encoder.tokens[: encoder.padding_begins]
        shown = [*enumerate(shown), *((None, token) for token in encoder.dropped)]
        bands += [
            drawing.words(summary(encoder), 15, drawing.BLUE),
            drawing.strip([GROUNDS[token.kind] for token in (*encoder.tokens, *encoder.dropped)]),
            drawing.cells([_cell(position, token) for position, token in shown[:MOST_CELLS]]),
        ]
        if len(shown) > MOST_CELLS:
            bands.append(drawing.words(f"and {len(shown) - MOST_CELLS} more", 13, drawing.PALE))
    bands.append(drawing.strip([]))
    bands.append(drawing.cells([drawing.Cell("", kind, ground) for kind, ground in GROUNDS.items()]))
    return drawing.stacked(bands)


def _cell(position: int | None, token: Token) -> drawing.Cell:
    where = "cut off" if position is None else f"{position}"
    weight = "" if token.weight == 1.0 else f"  x{token.weight:.3g}"
    number = "embedding" if token.id is None else f"#{token.id}"
    return drawing.Cell(f"{where}  {number}{weight}", token.piece, GROUNDS[token.kind])
