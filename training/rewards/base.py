"""What a reward is, what it may see, and the list of registered ones.

How single rewards compute stands in their own files, how a person names them in `spec.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ... import missing
from ...missing import page
from . import weights


@dataclass(frozen=True)
class Context:
    """What rewards may see beside N images; None is not known.

    prompts: N strings; sources: the images before the edit and targets: the target images, [N,H,W,3] float
    in 0..1; masks [N,H,W], 1 = edited.
    """

    prompts: Sequence[str] | None = None
    sources: Tensor | None = None
    masks: Tensor | None = None
    targets: Tensor | None = None

    @property
    def given(self) -> set[str]:
        """The names of what is known."""
        return {part.name for part in fields(self) if getattr(self, part.name) is not None}

    def check(self, count: int) -> None:
        """Raise ValueError unless all that is known is known of `count` images."""
        for name in sorted(self.given):
            if (found := len(getattr(self, name))) != count:
                raise ValueError(f"{found} {name} were given for {count} images: give one for each image.")

    def rows(self, part: slice) -> Context:
        """The context of some of the images."""
        return Context(**{name: getattr(self, name)[part] for name in self.given})


NOTHING = Context()


class Reward:
    """Judges finished images.

    name: how recipes, logs and file headers call it.
    range: (lowest, highest) usual value, for plots and documentation; scores are not clamped to it.
    needs: which parts of the `Context` must be given.
    """

    name: str = ""
    range: tuple[float, float] = (0.0, 1.0)
    needs: frozenset[str] = frozenset()
    batch_size: int = 16

    def score(self, images: Tensor, context: Context = NOTHING) -> Tensor:
        """Score images [N,H,W,3] in 0..1 -> float32 [N] on the CPU; an image that cannot be judged is NaN.

        Raises ValueError if something that the reward needs is missing or counts differ.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"images have shape {tuple(images.shape)}: reward {self.name} takes [N,H,W,3] in 0..1."
            )
        if lacking := self.missing(context.given):
            raise ValueError(f"reward {self.name} needs {lacking}: give them or choose another reward.")
        context.check(len(images))
        scores = [torch.empty(0)]
        with torch.no_grad():
            for start in range(0, len(images), self.batch_size):
                part = slice(start, start + self.batch_size)
                batch = self._score(images[part].float(), context.rows(part))
                scores.append(batch.detach().float().cpu())
        joined = torch.cat(scores)
        return torch.where(torch.isfinite(joined), joined, torch.nan)

    def missing(self, given: Collection[str]) -> str:
        """What it needs beside the images and what is `given` ("prompts", ...), in words; "" if nothing."""
        return ", ".join(sorted(self.needs - set(given)))

    def _score(self, images: Tensor, context: Context) -> Tensor:
        """Scores [n] of one batch [n,H,W,3] float32, already validated, under no_grad."""
        raise NotImplementedError


_REGISTRY: dict[str, Callable[..., Reward]] = {}


def register(name: str) -> Callable[[Callable[..., Reward]], Callable[..., Reward]]:
    """Class or factory decorator: makes a reward creatable by name."""

    def add(factory: Callable[..., Reward]) -> Callable[..., Reward]:
        _REGISTRY[name] = factory
        return factory

    return add


def names() -> list[str]:
    """Names of the registered rewards, sorted; the only ones a ComfyUI node may offer."""
    return sorted(_REGISTRY)


def factory(name: str) -> Callable[..., Reward]:
    """The class or function that makes a registered reward. Raises ValueError if there is none."""
    if name not in _REGISTRY:
        raise ValueError(f"reward {name!r} is not known: choose one of {', '.join(names())}.")
    return _REGISTRY[name]


def options(name: str) -> list[str]:
    """The options that a registered reward can be created with. Raises ValueError for an unknown name."""
    return list(inspect.signature(factory(name)).parameters)


def check_options(name: str, make: Callable[..., Reward], options: Collection[str]) -> None:
    """Raise ValueError for an option that `make`, which makes the reward `name`, does not take."""
    known = list(inspect.signature(make).parameters)
    if odd := [option for option in options if option not in known]:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ValueError(f"reward {name} has no option {odd[0]!r}: {takes}.")


def check_weight(name: str, weight: object) -> float:
    """The weight of a reward as a number. Raises ValueError unless it is finite and not 0."""
    try:
        number = float(weight)
    except (TypeError, ValueError):
        raise ValueError(
            f"reward {name} has the weight {weight!r}: write a number in rewards, as in {name}=0.5"
        ) from None
    if not math.isfinite(number) or number == 0:
        raise ValueError(
            f"the weight of reward {name} is {number:g}: give a finite number that is not 0, or leave the "
            "reward out"
        )
    return number


def package_of(name: str) -> str:
    """The module of an optional package that a reward judges with; "" for none, or an unknown reward."""
    return getattr(_REGISTRY.get(name), "package", "")


def at_hand(name: str) -> str:
    """What a reward lacks to judge at once, with the remedy; "" if nothing. Asks no network."""
    make = factory(name)
    if (package := getattr(make, "package", "")) and (lacking := missing.lacking(package)):
        return lacking
    rows = inspect.signature(make).parameters.items()
    if wanted := [option for option, row in rows if row.default is row.empty]:
        return f"needs the option {wanted[0]}: see {page('grpo.md')}"
    defaults = {option: row.default for option, row in rows}
    here = all(weights.on_disk(place) for place in weights.places(defaults).values())
    return "" if here else weights.remedy(defaults)


def check(name: str, **options: object) -> dict[str, object]:
    """The options that `create` would use, defaults included, where it can be expected to succeed.

    Loads nothing. Raises ValueError for an unknown name or option, or for a package or weights that are not
    there.
    """
    make = factory(name)
    check_options(name, make, options)
    signature = inspect.signature(make)
    for option, parameter in signature.parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"reward {name} needs the option {option}: see {page('grpo.md')}")
    if (package := getattr(make, "package", "")) and (lacking := missing.lacking(package)):
        raise ValueError(f"reward {name} cannot judge: {lacking}")
    bound = signature.bind(**options)
    bound.apply_defaults()
    if lacking := weights.absent(bound.arguments):
        raise ValueError(f"reward {name} has no weights: {lacking}; {weights.remedy(bound.arguments)}.")
    return bound.arguments


def create(name: str, **options: object) -> Reward:
    """A registered reward by name, its weights loaded.

    Raises ValueError as `check` does, and naming the reward where its weights cannot be loaded.
    """
    chosen = check(name, **options)
    try:
        return _REGISTRY[name](**options)
    except Exception as error:  # half a download, a damaged file, another model: every library has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = weights.remedy(chosen) if weights.places(chosen) else f"see {page('grpo.md')}"
        raise ValueError(f"reward {name} cannot be loaded ({reason}): {what}.") from error
