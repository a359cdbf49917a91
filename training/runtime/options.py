"""How options are declared, checked and listed: dataclass fields that carry their own documentation.

`group` makes the fields of one heading; a field knows its help, its choices and its range, so that neither
the checks nor the help text of the command line can say something else. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable
from typing import Any

WIDTH = 110  # columns of the help text


def group(title: str) -> Callable[..., Any]:
    """The function that declares the options of a heading.

    It takes (default, help, choices=, low=, high=): the words that are allowed, and the smallest and largest
    number, also of the members of a list. Mutable defaults are copied.
    """

    def option(
        default: Any,
        help: str,
        *,
        choices: tuple[str, ...] = (),
        low: float | None = None,
        high: float | None = None,
    ) -> Any:
        metadata = {"group": title, "help": help, "choices": choices, "low": low, "high": high}
        if isinstance(default, list):
            return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
        return dataclasses.field(default=default, metadata=metadata)

    return option


def check(config: Any) -> None:
    """Raise ValueError, naming the option, for a word or a number that its declaration does not allow."""
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), field.metadata["choices"]
        if allowed and value not in allowed:
            raise ValueError(f"{field.name} is {value!r}: use one of {', '.join(allowed)}")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)):
                _check_number(field, number)


def _check_number(field: dataclasses.Field, number: float) -> None:
    low, high = field.metadata["low"], field.metadata["high"]
    if not math.isfinite(number):
        raise ValueError(f"{field.name} is {number}: give a finite number")
    if low is not None and number < low:
        raise ValueError(f"{field.name} is {number}: it must be {low} or more")
    if high is not None and number > high:
        raise ValueError(f"{field.name} is {number}: it must be at most {high}")


def listing(kind: type, width: int = WIDTH) -> str:
    """All options of a configuration by group, each with its default and help; those of `essentials` first.

    kind: a dataclass of fields made by `group`, with the class variables `essentials`, the names that matter
    most, and `unused`, inherited ones that say nothing in it.
    """
    fields = [field for field in dataclasses.fields(kind) if field.name not in kind.unused]
    own = vars(kind).get("__annotations__", {})
    fields.sort(key=lambda field: field.name not in own)  # what a base class declares comes last
    first = [field for name in kind.essentials for field in fields if field.name == name]
    groups: dict[str, list[dataclasses.Field]] = {f"The {len(first)} that matter most": first}
    for field in fields:
        if field not in first:
            groups.setdefault(field.metadata["group"], []).append(field)
    return "\n\n".join(
        "\n".join([f"{title}:", *(_entry(field, width) for field in some)]) for title, some in groups.items()
    )


def table(kind: type) -> str:
    """The options as rows of a Markdown table: name, default, help."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        rows.append(f"| `{field.name}` | {_default(field) or '-'} | {field.metadata['help']} |")
    return "\n".join(rows)


def _default(field: dataclasses.Field) -> str:
    """As YAML writes it."""
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if isinstance(default, list):
        return f"[{', '.join(map(str, default))}]"
    return str(default).lower() if isinstance(default, bool) else "" if default is None else str(default)


def _entry(field: dataclasses.Field, width: int) -> str:
    """`name = default` and below it what may be written and what it means."""
    words = " | ".join(field.metadata["choices"])
    text = f"{words}. {field.metadata['help']}" if words else field.metadata["help"]
    wrapped = textwrap.fill(text, width, initial_indent="      ", subsequent_indent="      ")
    return f"  {field.name} = {_default(field)}".rstrip() + f"\n{wrapped}"
