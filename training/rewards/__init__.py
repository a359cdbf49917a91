"""Rewards: numbers that say how good a finished picture is.

`create(name, **options)` makes a registered reward, `from_recipe` also a callable or an HTTP endpoint, and
`Composite` joins several. A new reward is a class in the file of its kind with `@register("name")`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from . import clip, fidelity, shapes, vision, vlm  # noqa: F401  (each registers its rewards)
from .base import Reward, check, create, names, options, register
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
        known = list(inspect.signature(HttpReward).parameters)[1:]
        if odd := sorted(options.keys() - set(known)):
            raise ValueError(f"reward {name} has no option {odd[0]!r}: it takes {', '.join(known)}.")
        return HttpReward(name, **options)
    if ":" in name:
        if options:
            raise ValueError(f"reward {name} has no option {next(iter(options))!r}: it takes none.")
        return CallableReward.load(name)
    return create(name, **options)


__all__ = [
    "Composite",
    "CompositeScores",
    "Reward",
    "check",
    "create",
    "from_recipe",
    "group_normalise",
    "names",
    "options",
    "register",
]
