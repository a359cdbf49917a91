"""Rewards as a person chooses them, one after another, before any of them is loaded.

What flows between ComfyUI nodes, and what `--judge` of the command line makes: registered rewards only, since
a shared workflow must not be able to import code or open a connection of its choosing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from . import base
from .composite import Composite


@dataclass(frozen=True)
class Entry:
    """One registered reward, its weight, and its options as (name, value) pairs."""

    name: str
    weight: float = 1.0
    options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        if self.name not in base.names():
            raise ValueError(f"reward {self.name!r} is not known: choose one of {', '.join(base.names())}.")
        base.check_weight(self.name, self.weight)
        known = base.options(self.name)
        for option, _ in self.options:
            if option not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                raise ValueError(f"reward {self.name} has no option {option!r}: {takes}.")


@dataclass(frozen=True)
class Chosen:
    """Some rewards together. `composite` loads their weights, once for as long as this object lives."""

    entries: tuple[Entry, ...] = ()

    def __post_init__(self):
        names = [entry.name for entry in self.entries]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"reward {sorted(twice)[0]} was chosen twice: raise its weight instead.")

    def and_also(self, entry: Entry) -> Chosen:
        return replace(self, entries=(*self.entries, entry))

    @cached_property
    def composite(self) -> Composite:
        """The rewards themselves. Raises ValueError naming the reward whose weights are not there."""
        rewards = [base.create(entry.name, **dict(entry.options)) for entry in self.entries]
        weights = {r.name: e.weight for r, e in zip(rewards, self.entries, strict=True)}
        return Composite(rewards, weights)

    def recipe(self) -> dict[str, list[str]]:
        """`rewards` and `reward_options` as a GRPO recipe writes them."""
        return {
            "rewards": [f"{entry.name}={entry.weight:g}" for entry in self.entries],
            "reward_options": [
                f"{entry.name}.{key}={value}" for entry in self.entries for key, value in entry.options
            ],
        }

    def __str__(self) -> str:
        return ", ".join(f"{entry.name} x {entry.weight:g}" for entry in self.entries)


def parse(text: str) -> Entry:
    """`NAME`, `NAME=WEIGHT` or `NAME:key=value,key=value` (or both, weight first) -> an entry.

    Raises ValueError for an unknown name or option, or a weight that is no number.
    """
    head, _, tail = text.partition(":")
    name, _, weight = head.partition("=")
    Entry(name.strip())  # an unknown name comes before what is wrong with its options
    number = base.check_weight(name.strip(), weight or 1)
    pairs = [part.partition("=") for part in tail.split(",") if part]
    if bad := [key for key, equals, _ in pairs if not equals]:
        raise ValueError(f"{text!r} has the option {bad[0]!r}: write key=value.")
    return Entry(name.strip(), number, tuple((key.strip(), value) for key, _, value in pairs))
