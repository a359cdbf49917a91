"""The rows of a node's INPUT_TYPES: one function for each kind of input, and the widgets that nodes share.

A row reads `"name": kind(default, range)("tooltip")` and becomes the (type, options) tuple that ComfyUI's
schema wants. Saved workflows hold widget values by position: never reorder the rows of a released node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..models.geometry import AUTO_POLICIES

Row = tuple[Any, dict[str, Any]]
Tooltip = Callable[[str], Row]  # what a kind of input returns: call it with the tooltip

AUTO = "auto"
LARGEST_SEED = 2**64 - 1  # of ComfyUI's own seed widgets


def _row(kind: str | list[str], **options: Any) -> Tooltip:
    return lambda tooltip: (kind, {**options, "tooltip": tooltip})


def socket(kind: str) -> Tooltip:
    """An input of ComfyUI's type `kind` ("IMAGE", "MODEL", ...) that only a link can fill."""
    return _row(kind)


def integer(default: int, low: int, high: int, **options: Any) -> Tooltip:
    """A whole number in low..high. options: ComfyUI's own, such as `step` and `advanced`."""
    return _row("INT", default=default, min=low, max=high, **options)


def number(default: float, low: float, high: float, **options: Any) -> Tooltip:
    """A number in low..high; `step` is what an arrow of the widget adds, and its precision unless `round`."""
    return _row("FLOAT", default=default, min=low, max=high, **options)


def text(default: str = "", **options: Any) -> Tooltip:
    """A line of text, or with multiline=True a field."""
    return _row("STRING", default=default, **options)


def switch(default: bool, **options: Any) -> Tooltip:
    """On (True) or off (False)."""
    return _row("BOOLEAN", default=default, **options)


def choice(entries: Iterable[str], default: str | None = None, **options: Any) -> Tooltip:
    """A menu of `entries`; without a default ComfyUI takes the first."""
    return _row(list(entries), **({} if default is None else {"default": default}), **options)


def seed(**options: Any) -> Tooltip:
    """The seed of something random, 0 to 2^64 - 1."""
    return integer(0, 0, LARGEST_SEED, **options)


def automatic(kind: str, unset: float, low: float, high: float, **options: Any) -> Tooltip:
    """A number in low..high, or "auto", the default: a text to type into, a link brings either.

    kind: "INT" or "FLOAT". unset: the number that the node gets for auto. Workflows that were saved while
    the widget was a number hold it; it still means auto (`guard.py` reads all of them).
    """
    meant = {"kind": kind, "unset": unset, "min": low, "max": high}
    return _row(f"{kind},STRING", default=AUTO, widgetType="STRING", automatic=meant, **options)


def policy(**options: Any) -> Tooltip:
    """How an image meets a size it does not have (`models/geometry.py`); "stretch" unless chosen."""
    return choice(AUTO_POLICIES, **{"default": "stretch", **options})


def eta(**options: Any) -> Tooltip:
    """The noise of the SDE step rules (`samplers/rules.py`); auto, -1 to the node, is the rule's own."""
    return automatic("FLOAT", -1.0, -1.0, 2.0, **options)


def reward() -> Row:
    """Who judges."""
    return socket("DIPTYCH_REWARD")("Who judges, from an Edit Reward node.")


# The widgets of both training nodes; auto stands for the value that the recipe or preset has.


def output_name(default: str) -> Row:
    """The name of the trained file."""
    return text(default)("File name in the loras folder, without extension.")


def of_recipe(tooltip: str, high: int) -> Row:
    """A whole number from 1 to `high`, or the recipe's or preset's own."""
    return automatic("INT", 0, 0, high, advanced=True)(tooltip)


def rank(default: str) -> Row:
    """The LoRA's rank; auto is `default`."""
    return of_recipe(f"LoRA rank, 1 to 512; auto: {default}.", 512)


def learning_rate(default: str) -> Row:
    """The learning rate; auto is `default`."""
    return automatic("FLOAT", 0.0, 0.0, 1.0, advanced=True)(f"Of AdamW, such as 1e-4; auto: {default}.")


def resolution(default: str) -> Row:
    """The side of an image in pixels; auto is `default`."""
    return of_recipe(f"Side of one image in pixels, a multiple of 16; auto: {default}.", 4096)


def precision() -> Row:
    """The number format of the weights that are not trained."""
    return choice(["auto", "bfloat16", "float8_e4m3fn", "float32"], "auto", advanced=True)(
        "Of the frozen base. auto: fp8 below 40 GB of GPU memory, else bfloat16."
    )


def save_every(default: int, unit: str) -> Row:
    """How many steps lie between two checkpoints; `unit` is what a step is called."""
    return integer(default, 1, 100_000, advanced=True)(f"{unit} between checkpoints.")


def preview_every(default: int, unit: str) -> Row:
    """How many steps lie between two previews, 0 = none; `unit` is what a step is called."""
    return integer(default, 0, 100_000, advanced=True)(f"{unit} between sample images; 0 = none.")


def training_seed() -> Row:
    """The seed of a training; its range is that of NumPy's generators."""
    return integer(0, 0, 2**31 - 1, advanced=True)("Of noise, order and weights.")
