"""The one error of this package."""

from __future__ import annotations


class LoraError(ValueError):
    """A LoRA that cannot be read or does not fit the model; the message is one sentence with the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: object) -> str:
    """The text without what a terminal would obey: names come from files that anybody may have written."""
    return "".join(c if c.isprintable() else "?" for c in str(text))
