"""What every node checks of its widgets' values, wherever they come from.

ComfyUI holds a value typed into a widget to the menu or the range, but not one that arrives by a link. So
the function of every node is wrapped once, where `nodes/__init__.py` hands it to ComfyUI: values are
compared with `INPUT_TYPES`, and given to `VALIDATE_INPUTS`, before it runs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from typing import Any

from .. import failures, missing
from .widgets import AUTO

PACK = __name__.rpartition(".nodes.")[0]  # in ComfyUI the path of its folder
LONGEST = 60  # characters of a value that an error repeats


def guard(cls: type) -> type:
    """The node class as ComfyUI gets it: its function checks its values first and raises plain errors."""
    function = getattr(cls, cls.FUNCTION)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(self: object, *args: object, **inputs: object) -> Any:
        bound = signature.bind(self, *args, **inputs)
        bound.arguments.update(_checked_for(cls, bound.arguments))
        try:
            return function(*bound.args, **bound.kwargs)
        except Exception as error:
            plain = _plain(error)
            if plain is None:
                raise
            raise plain from error

    return type(
        cls.__name__, (cls,), {cls.FUNCTION: run, "__doc__": cls.__doc__, "__module__": cls.__module__}
    )


def _plain(error: Exception) -> Exception | None:
    """The error as ComfyUI should show it: a sentence, a plain type; None if it is so, or nothing of ours.

    ComfyUI titles an error with the module and name of its class: for one of ours, a path.
    """
    if isinstance(error, ImportError):
        return ImportError(missing.sentence(error), name=error.name)
    if isinstance(error, ValueError):
        return None if type(error) is ValueError else ValueError(str(error))
    if type(error).__module__.startswith(f"{PACK}."):
        return RuntimeError(str(error))
    sentence = failures.translated(error)
    return RuntimeError(sentence) if sentence else None


def validated(cls: type, **values: Any) -> bool | str:
    """What `VALIDATE_INPUTS` says of the widget values it names: True, or why the node cannot run.

    They are held to their menus and ranges, which ComfyUI leaves to it; and what `cls.NEEDS` names has to be
    installed. None is a value that comes by a link.
    """
    try:
        checked(cls.INPUT_TYPES(), {name: value for name, value in values.items() if value is not None})
    except ValueError as error:
        return str(error)
    return missing.lacking(*cls.NEEDS) or True


def _checked_for(cls: type, inputs: dict[str, Any]) -> dict[str, Any]:
    """As `checked`, but what the class validates itself is left to its `VALIDATE_INPUTS`, as ComfyUI does."""
    own: dict[str, Any] = {}
    if validate := getattr(cls, "VALIDATE_INPUTS", None):
        own = {name: inputs[name] for name in inspect.signature(validate).parameters if name in inputs}
        if (answer := validate(**own)) is not True:
            raise ValueError(answer)
    if hasattr(cls, "NEEDS"):  # `validated` leaves open what came by a link
        own = {}
    return checked(cls.INPUT_TYPES(), {name: value for name, value in inputs.items() if name not in own})


def checked(schema: dict, inputs: dict[str, Any]) -> dict[str, Any]:
    """The widget values among `inputs`, as their own types. Raises ValueError naming the input and its value.

    schema: a node's INPUT_TYPES.
    """
    known = {**schema.get("required", {}), **schema.get("optional", {})}
    return {name: _value(name, value, *known[name]) for name, value in inputs.items() if name in known}


def _value(name: str, value: Any, kind: Any, options: dict | None = None) -> Any:
    options = options or {}
    if "automatic" in options:
        return _automatic(name, value, **options["automatic"])
    if isinstance(kind, (list, tuple)):
        if not any(value is entry or (type(value) is type(entry) and value == entry) for entry in kind):
            raise ValueError(f"{name} is {short(value)}, which is not known: choose {_menu(kind)}.")
        return value
    if kind == "STRING" and not isinstance(value, str):
        raise ValueError(f"{name} is {short(value)}, a {type(value).__name__}: give it a text.")
    if kind in ("INT", "FLOAT"):
        return _number(name, value, kind, options.get("min", -math.inf), options.get("max", math.inf))
    return value


def _automatic(name: str, value: Any, kind: str, unset: float, min: float, max: float) -> int | float:
    """The number that a text or number of `widgets.automatic` means: `unset` for "auto"."""
    if isinstance(value, str):
        if value.strip().lower() in ("", AUTO):
            return unset
        with contextlib.suppress(ValueError):  # else it is refused as it was typed
            value = float(value)
    try:
        return _number(name, value, kind, min, max)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}, or {AUTO}.") from None


def _number(name: str, value: Any, kind: str, low: float, high: float) -> int | float:
    wanted = f"give a {'whole ' if kind == 'INT' else ''}number from {low} to {high}"
    try:
        number = value.__index__() if hasattr(value, "__index__") else float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {short(value)}, a {type(value).__name__}: {wanted}.") from None
    fits = isinstance(number, int) or math.isfinite(number)
    if isinstance(value, str) or not fits or not low <= number <= high or (kind == "INT" and number % 1):
        raise ValueError(f"{name} is {short(value)}: {wanted}.")
    return int(number) if kind == "INT" else float(number)


def short(value: object) -> str:
    """`repr` of a value, cut to what fits into a sentence."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _menu(entries: list | tuple) -> str:
    if not entries:
        return "from its menu, which is empty"
    shown = ", ".join(map(str, entries[:12]))
    return f"one of {shown}" if len(entries) <= 12 else f"one of {shown} and {len(entries) - 12} more"
