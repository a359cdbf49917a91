"""Rewards: numbers that say how good a finished image is.

`create(name, **options)` makes a registered reward, a `Spec` any that a person may name, a `Selection`
several as one `Composite`. A new reward is a class in the file of its kind with `@register("name")`.
"""

from . import clip, fidelity, multimodal, shapes, vision, vlm  # noqa: F401  (each registers its rewards)
from .base import Context, Reward, at_hand, check, create, names, options, package_of, register
from .composite import Composite, CompositeScores, group_normalise
from .spec import Selection, Spec, from_recipe, parse

__all__ = [
    "Composite",
    "CompositeScores",
    "Context",
    "Reward",
    "Selection",
    "Spec",
    "at_hand",
    "check",
    "create",
    "from_recipe",
    "group_normalise",
    "names",
    "options",
    "package_of",
    "parse",
    "register",
]
