"""Rewards as a person names them, before any of them is loaded: one spec for recipes, `--judge` and nodes.

A recipe may also name Python functions and addresses (`external`). Nodes and `--judge` may not, since a
shared workflow must not be able to import code or open a connection of its choosing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from . import base, downloads
from .composite import Composite
from .external import CallableReward, HttpReward

HTTP = ("http://", "https://")


@dataclass(frozen=True)
class Spec:
    """One reward, its weight, and its options as (name, value) pairs of texts.

    name: a registered one or, if `external`, also `module:function` or an http(s) address. Raises ValueError
    for an unknown name or option, and for a weight that is 0 or not finite.
    """

    name: str
    weight: float = 1.0
    options: tuple[tuple[str, str], ...] = ()
    external: bool = False

    def __post_init__(self):
        if self.name not in base.names() and not (self.external and ":" in self.name):
            base.factory(self.name)  # says that it is not known
        base.check_weight(self.name, self.weight)
        base.check_options(self.name, self._factory, dict(self.options))

    @property
    def _factory(self) -> Callable[..., base.Reward]:
        """Makes the reward from its options."""
        if self.name in base.names():
            return base.factory(self.name)
        if self.name.startswith(HTTP):
            return partial(HttpReward, self.name)
        return partial(CallableReward.load, self.name)

    def _values(self) -> dict[str, Any]:
        """The options, numbers as numbers where the reward does not ask for text."""
        parameters = inspect.signature(self._factory).parameters
        return {
            key: value if "str" in str(parameters[key].annotation) else _number(value)
            for key, value in self.options
        }

    def check(self) -> None:
        """Raise ValueError for what `create` would refuse, as far as it shows without loading."""
        if self.name in base.names():
            base.check(self.name, **self._values())

    def fetch(self, heard: downloads.Heard) -> None:
        """Download what the reward's weights lack, as `downloads.fetch`. Raises as `check` does."""
        if self.name in base.names():
            downloads.fetch(base.check(self.name, **self._values()), heard)

    def create(self) -> base.Reward:
        """The reward, its weights loaded. Raises ValueError naming it where that cannot be done."""
        values = self._values()
        return base.create(self.name, **values) if self.name in base.names() else self._factory(**values)


@dataclass(frozen=True)
class Selection:
    """Some rewards together, none of them twice."""

    specs: tuple[Spec, ...] = ()

    def __post_init__(self):
        names = [spec.name for spec in self.specs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"reward {sorted(twice)[0]} was chosen twice: raise its weight instead.")

    def and_also(self, spec: Spec) -> Selection:
        """These and one more. Raises ValueError if it is one of them."""
        return replace(self, specs=(*self.specs, spec))

    def check(self) -> None:
        """As `Spec.check`, of all."""
        for spec in self.specs:
            spec.check()

    def fetch(self, heard: downloads.Heard) -> None:
        """As `Spec.fetch`, of all; nothing once they are loaded."""
        if "composite" not in self.__dict__:
            for spec in self.specs:
                spec.fetch(heard)

    @cached_property
    def composite(self) -> Composite:
        """The rewards themselves, loaded once for as long as this object lives.

        Raises ValueError naming the reward that cannot be loaded.
        """
        rewards = [spec.create() for spec in self.specs]
        weights = {r.name: spec.weight for r, spec in zip(rewards, self.specs, strict=True)}
        return Composite(rewards, weights)

    def recipe(self) -> dict[str, list[str]]:
        """`rewards` and `reward_options` as a recipe of reward training writes them; see `from_recipe`."""
        return {
            "rewards": [
                spec.name if spec.name.startswith(HTTP) else f"{spec.name}={spec.weight:g}"
                for spec in self.specs
            ],
            "reward_options": [
                f"{spec.name}.{key}={value}" for spec in self.specs for key, value in spec.options
            ],
        }

    def __str__(self) -> str:
        return ", ".join(f"{spec.name} x {spec.weight:g}" for spec in self.specs)


def parse(text: str, external: bool = False) -> Spec:
    """`NAME`, `NAME=WEIGHT`, `NAME:KEY=VALUE,...` or `NAME=WEIGHT:KEY=VALUE,...` -> a spec.

    If `external`, also `module:function`, `module:function=WEIGHT`, and an http(s) address. Raises ValueError
    for an unknown name or option, or a weight that is no number.
    """
    if external and text.startswith(HTTP):
        return Spec(text, external=True)
    head, _, tail = text.partition(":")
    name, _, weight = (part.strip() for part in head.partition("="))
    if external and tail and name not in base.names():
        name, _, weight = text.partition("=")
        return Spec(name, base.check_weight(name, weight or 1), external=True)
    base.factory(name)  # an unknown one is said before what is wrong with its options
    pairs = [part.partition("=") for part in tail.split(",") if part]
    if bad := [key for key, equals, _ in pairs if not equals]:
        raise ValueError(f"{text!r} has the option {bad[0]!r}: write key=value.")
    options = tuple((key.strip(), value) for key, _, value in pairs)
    return Spec(name, base.check_weight(name, weight or 1), options, external)


def from_recipe(rewards: Sequence[str], reward_options: Sequence[str]) -> Selection:
    """What a recipe says: `rewards` as `parse` reads them, options also apart, as `NAME.KEY=VALUE`.

    Raises ValueError if none is named or an option is of none of them.
    """
    if not rewards:
        raise ValueError("rewards is empty: name at least one, for example rewards: [pickscore]")
    specs = Selection(tuple(parse(text, external=True) for text in rewards)).specs
    options: dict[str, list[tuple[str, str]]] = {spec.name: list(spec.options) for spec in specs}
    for option in reward_options:
        key, _, value = option.partition("=")
        name, _, key = key.rpartition(".")
        if name not in options or not key:
            raise ValueError(f"reward option {option!r}: write NAME.KEY=VALUE with one of {sorted(options)}")
        options[name].append((key, value))
    return Selection(tuple(replace(spec, options=tuple(options[spec.name])) for spec in specs))


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
