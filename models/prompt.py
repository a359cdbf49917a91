"""The in-context prompt: what ICEdit was trained to read, and variations of it. Strings only."""

from __future__ import annotations

import re

from .geometry import check_choice

# Word for word the sentence ICEdit trains and samples with (scripts/inference.py, src/train/data.py).
ICEDIT_TEMPLATE = (
    "A diptych with two side-by-side images of the same scene. "
    "On the right, the scene is exactly the same as on the left but {instruction}"
)
# The authors' advice when an edit changes more than it was asked to.
KEEP_REST = ", with other regions the same as on the {source}"

# side of the edit -> (name of the edited side, name of the source's side, arrangement)
SIDES = {
    "right": ("right", "left", "side-by-side"),
    "left": ("left", "right", "side-by-side"),
    "bottom": ("bottom", "top", "stacked"),
    "top": ("top", "bottom", "stacked"),
}
_ANY_SIDE = ICEDIT_TEMPLATE.replace("right", "{edited}").replace("left", "{source}")
_ANY_SIDE = _ANY_SIDE.replace("side-by-side", "{arrangement}")
_OWN_DIPTYCH = re.compile(r"\s*a\s+diptych\s+with\s+two\b", re.IGNORECASE)


def format_prompt(
    instruction: str | None,
    template: str = ICEDIT_TEMPLATE,
    *,
    side: str = "right",
    keep_rest: bool = False,
) -> str:
    """Put an instruction into the in-context sentence.

    `template` must hold `{instruction}`; it may hold `{edited}`, `{source}` ("right", "left", "top",
    "bottom") and `{arrangement}` ("side-by-side", "stacked"), which follow `side`. The default template
    speaks of right and left, and follows `side` by itself. Other braces are left as they are. `keep_rest`
    adds that other regions stay the same.

    A prefix that was typed already (in any case and spacing) is not doubled, and an instruction that opens
    with a diptych sentence of its own is returned as typed. An empty instruction gives an empty prompt.
    Raises ValueError if the template has no `{instruction}` or the side is unknown.
    """
    check_choice("side", side, SIDES)
    if "{instruction}" not in template:
        raise ValueError(f"template is {template[:60]!r}: write {{instruction}} where it belongs.")
    words = (instruction or "").strip()
    if not words:
        return ""
    sentence = _ANY_SIDE if template == ICEDIT_TEMPLATE else template
    sentence += KEEP_REST if keep_rest else ""
    for key, word in zip(("edited", "source", "arrangement"), SIDES[side], strict=True):
        sentence = sentence.replace("{" + key + "}", word)
    prefix, suffix = sentence.split("{instruction}", 1)
    words = _without(words, prefix, suffix)
    if _OWN_DIPTYCH.match(words):
        return words
    return prefix + words + suffix.replace("{instruction}", words)


def instruction_of(prompt: str, template: str = ICEDIT_TEMPLATE) -> str | None:
    """The instruction inside a prompt that `format_prompt` made of this template; None for other prompts."""
    prefix, suffix = template.split("{instruction}", 1)
    words = _without(prompt, prefix, suffix)
    return words if words != prompt and prefix.strip() else None


def _without(words: str, prefix: str, suffix: str) -> str:
    """`words` less a prefix and a suffix they already carry, compared without regard to case and spacing."""

    def pattern(text: str) -> str:
        return r"\s+".join(re.escape(word) for word in text.split())

    if prefix.strip():
        words = re.sub(rf"^\s*{pattern(prefix)}\s*", "", words, flags=re.IGNORECASE)
    if suffix.strip():
        words = re.sub(rf"\s*{pattern(suffix)}\s*$", "", words, flags=re.IGNORECASE)
    return words
