"""Rewards: numbers that say how good a finished picture is.

`create(name, **options)` makes a registered reward, `from_recipe` also a callable or an HTTP endpoint, and
`Composite` joins several. A new reward is a class in the file of its kind with `@register("name")`.
"""

from __future__ import annotations

from collections.abc import Mapping

from . import clip, fidelity, shapes, vision, vlm  # noqa: F401  (each registers its rewards)
from .base import Reward, create, names, options, register
from .composite import Composite, CompositeScores, group_normalise


def from_recipe(entry: str | Mapping[str, object]) -> Reward:
    """A reward as a recipe file writes it: a registered name, `module:function`, an http(s) address, or a
    mapping {name: one of these, ...options}. For recipes only; nodes use `create`.

    Raises ValueError if the entry names nothing.
    """
    from .external import CallableReward, HttpReward

    options = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
    name = str(options.pop("name", ""))
    options.pop("weight", None)
    if name.startswith(("http://", "https://")):
        return HttpReward(name, **options)
    if ":" in name:
        return CallableReward.load(name)
    return create(name, **options)


__all__ = [
    "Composite",
    "CompositeScores",
    "Reward",
    "create",
    "from_recipe",
    "group_normalise",
    "names",
    "options",
    "register",
]
