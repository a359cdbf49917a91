"""peft's name patterns (alpha_pattern) without `re`: a file's own text must not be able to hang its reader.

What real files hold is understood: names, `\\d`, `\\w`, `.`, `[...]`, `+ * ?`, `^ $` and one level of
`(a|b)`. Each match takes time in proportion to pattern and name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from .errors import LoraError

_LONGEST, _MOST, _BRANCHES = 500, 200, 64
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "D": lambda c: not c.isdecimal(),
}


class _Token(NamedTuple):
    accepts: Callable[[str], bool]
    least: int  # 0 or 1
    many: bool


class Patterns:
    """First match wins, as in peft: a pattern is a module's whole name or its tail after a dot."""

    def __init__(self, values: Mapping[str, float], source: str) -> None:
        self.names: dict[str, tuple[int, float]] = {}  # tails too
        self.wholes: dict[str, tuple[int, float]] = {}
        self.others: list[tuple[int, bool, list[list[_Token]], float]] = []
        for i, (pattern, value) in enumerate(values.items()):
            plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if all(c.isalnum() or c in "_.-" for c in plain):
                (self.wholes if pattern.startswith("^") else self.names).setdefault(plain, (i, value))
            elif len(self.others) < _MOST and len(pattern) <= _LONGEST:
                self.others.append((i, pattern.startswith("^"), _parse(pattern, source), value))
            else:
                raise LoraError(f"{source} has more or longer patterns than any trainer writes: remove them")

    def value(self, name: str) -> float | None:
        """The value of the first pattern that matches, or None."""
        tails = [name, *(name[i + 1 :] for i, c in enumerate(name) if c == ".")]
        literal = [self.names[t] for t in tails if t in self.names]
        found = min(literal + ([self.wholes[name]] if name in self.wholes else []), default=None)
        for i, whole, branches, value in self.others:
            if found is not None and found[0] < i:
                break
            if any(_matches(b, t) for t in (tails[:1] if whole else tails) for b in branches):
                return value
        return None if found is None else found[1]


def _matches(tokens: list[_Token], text: str) -> bool:
    at = {0}
    for accepts, least, many in tokens:
        reached = set() if least else set(at)
        for start in at:
            while start < len(text) and accepts(text[start]) and start + 1 not in reached:
                start += 1
                reached.add(start)
                if not many:
                    break
        at = reached
    return len(text) in at


def _parse(pattern: str, source: str) -> list[list[_Token]]:
    """The pattern's alternatives, groups multiplied out."""
    pieces: list[list[str]] = []
    rest = pattern.removeprefix("^").removesuffix("$")
    while rest:
        before, opened, after = rest.partition("(")
        pieces.append([before])
        if not opened:
            break
        inside, closed, rest = after.partition(")")
        if not closed or "(" in inside or rest[:1] in ("+", "*", "?", "{") or before.endswith("\\"):
            raise _unclear(pattern, source)
        pieces.append(inside.removeprefix("?:").split("|"))
    count = 1
    for piece in pieces:
        count *= len(piece)
    if count > _BRANCHES:
        raise _unclear(pattern, source)
    return [_tokens("".join(choice), pattern, source) for choice in itertools.product(*pieces)]


def _tokens(text: str, pattern: str, source: str) -> list[_Token]:
    tokens, i = [], 0
    while i < len(text):
        c, i = text[i], i + 1
        if c == "\\" and i < len(text):
            c, i = text[i], i + 1
            accepts = _CLASSES.get(c, c.__eq__)
        elif c == ".":
            accepts = bool
        elif c == "[" and (end := text.find("]", i)) > i and text[i] != "^":
            accepts, i = _members(text[i:end]).__contains__, end + 1
        elif c in "[]{}()|+*?^$\\":
            raise _unclear(pattern, source)
        else:
            accepts = c.__eq__
        sign = text[i] if i < len(text) and text[i] in "+*?" else ""
        i += len(sign)
        if sign and text[i : i + 1] == "?":  # lazy: the same language
            i += 1
        tokens.append(
            _Token(accepts, 0 if sign in ("*", "?") and sign else 1, sign in ("+", "*") and bool(sign))
        )
    return tokens


def _members(text: str) -> set[str]:
    found, i = set(), 0
    while i < len(text):
        if text[i + 1 : i + 2] == "-" and i + 2 < len(text):
            found |= {chr(n) for n in range(ord(text[i]), min(ord(text[i + 2]), ord(text[i]) + 256) + 1)}
            i += 3
        else:
            found.add(text[i])
            i += 1
    return found


def _unclear(pattern: str, source: str) -> LoraError:
    return LoraError(
        f"{source} has the pattern {pattern[:80]!r}, which is more than module names, \\d+ and (a|b): "
        "write the names out"
    )
