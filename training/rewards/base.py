"""What a reward is, and the list of registered ones. How single rewards compute stands in their own files."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ...missing import page
from . import weights


class Reward:
    """Judges finished pictures.

    name: how recipes, logs and file headers call it.
    range: (lowest, highest) usual value, for plots and documentation; scores are not clamped to it.
    needs: which of "prompts", "sources", "masks", "targets" must be given.
    """

    name: str = ""
    range: tuple[float, float] = (0.0, 1.0)
    needs: frozenset[str] = frozenset()
    batch_size: int = 16

    def score(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        sources: Tensor | None = None,
        masks: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Score images [N,H,W,3] in 0..1 -> float32 [N] on the CPU; a picture that cannot be judged is NaN.

        prompts: N strings; sources: the pictures before the edit [N,H,W,3]; masks: [N,H,W], 1 = edited;
        targets: the pictures wanted [N,H,W,3], where the data has them.
        Raises ValueError if something that the reward needs is missing or counts differ.
        """
        given = {"prompts": prompts, "sources": sources, "masks": masks, "targets": targets}
        count, lacking = len(images), self.missing({key for key, value in given.items() if value is not None})
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"images have shape {tuple(images.shape)}: reward {self.name} takes [N,H,W,3] in 0..1."
            )
        if lacking:
            raise ValueError(f"reward {self.name} needs {lacking}: give them or choose another reward.")
        for key, value in given.items():
            if value is not None and len(value) != count:
                raise ValueError(
                    f"{len(value)} {key} were given for {count} images: give one for each image."
                )
        scores = []
        with torch.no_grad():
            for start in range(0, count, self.batch_size):
                part = slice(start, start + self.batch_size)
                batch = {key: None if value is None else value[part] for key, value in given.items()}
                scores.append(self._score(images[part].float(), **batch).detach().float().cpu())
        joined = torch.cat(scores) if scores else torch.empty(0)
        return torch.where(torch.isfinite(joined), joined, torch.nan)

    def missing(self, given: Collection[str]) -> str:
        """What it needs beside the images and what is `given` ("prompts", ...), in words; "" if nothing."""
        return ", ".join(sorted(self.needs - set(given)))

    def _score(
        self,
        images: Tensor,
        prompts: Sequence[str] | None,
        sources: Tensor | None,
        masks: Tensor | None,
        targets: Tensor | None,
    ) -> Tensor:
        """One batch, already validated, under no_grad."""
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


def options(name: str) -> list[str]:
    """The options that a registered reward can be created with."""
    return [] if name not in _REGISTRY else list(inspect.signature(_REGISTRY[name]).parameters)


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


def check(name: str, **options: object) -> dict[str, object]:
    """The options that `create` would use, defaults included, where it can be expected to succeed.

    Loads nothing. Raises ValueError for an unknown name or option, or for a package or weights that are not
    there.
    """
    if name not in _REGISTRY:
        raise ValueError(f"reward {name!r} is not known: choose one of {', '.join(names())}.")
    factory = _REGISTRY[name]
    signature = inspect.signature(factory)
    for option in options:
        if option not in signature.parameters:
            known = ", ".join(signature.parameters)
            takes = f"it takes {known}" if known else "it takes none"
            raise ValueError(f"reward {name} has no option {option!r}: {takes}.")
    for option, parameter in signature.parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"reward {name} needs the option {option}: see {page('grpo.md')}")
    package = getattr(factory, "package", "")
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"reward {name} needs the package {package}: pip install {package}.")
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
        what = weights.remedy(chosen) if weights.wanted(chosen) else f"see {page('grpo.md')}"
        raise ValueError(f"reward {name} cannot be loaded ({reason}): {what}.") from error
