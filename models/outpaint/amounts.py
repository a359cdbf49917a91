"""How much room a side gets: the units that `expand` takes, all turned into whole pixels."""

from __future__ import annotations

import math

from ..geometry import check_choice
from .inputs import whole_number

UNITS = ("px", "cells", "fraction", "aspect", "size")
SIDES = ("left", "top", "right", "bottom")
CELL = 8  # pixels to a latent cell
AXES = {"width": ("left", "right"), "height": ("top", "bottom")}

Amounts = dict[str, float]


def in_pixels(amounts: Amounts, unit: str, size: tuple[int, int]) -> dict[str, int]:
    """The amounts of all four sides in pixels (negative: crop) for an image of (height, width).

    Raises ValueError for an amount that is no finite number or does not fit the unit.
    """
    check_choice("unit", unit, UNITS)
    for name, value in amounts.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}: give a number.")
    if unit == "aspect":
        return _to_aspect(amounts, size)
    if unit == "size":
        return _to_size(amounts, size)
    if unit == "fraction":
        length = {side: size[1] if side in AXES["width"] else size[0] for side in SIDES}
        return {
            side: int(math.copysign(math.floor(abs(value) * length[side] + 1e-9), value))
            for side, value in amounts.items()
        }
    for name, value in amounts.items():
        if value != int(value):
            raise ValueError(f"{name} is {value} {unit}: give a whole number, or unit 'fraction'.")
    return {side: int(value) * (CELL if unit == "cells" else 1) for side, value in amounts.items()}


def _to_size(amounts: Amounts, size: tuple[int, int]) -> dict[str, int]:
    """The amounts that make each axis as long as the number given to one of its sides or, equal, to both."""
    result = dict.fromkeys(SIDES, 0)
    for (axis, sides), length in zip(AXES.items(), (size[1], size[0]), strict=True):
        given = {side: amounts[side] for side in sides if amounts[side]}
        if len(set(given.values())) > 1:
            said = " and ".join(f"{side} is {value}" for side, value in given.items())
            raise ValueError(f"{said}: with unit 'size' both name the {axis} to reach, so give the same.")
        if given:
            side, target = next(iter(given.items()))
            result.update(_shared(whole_number(target, side, 1) - length, list(given)))
    return result


def _to_aspect(amounts: Amounts, size: tuple[int, int]) -> dict[str, int]:
    """The amounts that reach the width / height which is given to some of the sides by growing those."""
    given = {side: value for side, value in amounts.items() if value}
    said = ", ".join(f"{side} is {value}" for side, value in given.items()) or "no side is given"
    if len(set(given.values())) != 1 or min(given.values()) <= 0:
        raise ValueError(f"{said}: with unit 'aspect' give one width / height, such as 1.5, to the sides.")
    target, (height, width) = next(iter(given.values())), size
    growth = round(height * target) - width
    axis = "width"
    if growth < 0:
        axis, growth = "height", max(round(width / target) - height, 0)
    sides = [side for side in AXES[axis] if side in given]
    if growth and not sides:
        raise ValueError(
            f"{said}, but a {width}x{height} image reaches that aspect by more {axis}: give the number to"
            f" {' or '.join(AXES[axis])}."
        )
    return dict.fromkeys(SIDES, 0) | _shared(growth, sides)


def _shared(growth: int, sides: list[str]) -> dict[str, int]:
    """The growth in equal shares, an odd pixel to the last side."""
    if len(sides) < 2:
        return dict.fromkeys(sides, growth)
    return {sides[0]: growth // 2, sides[1]: growth - growth // 2}
