"""How options that hold more than one value are written: one small type each, with its parser.

(The window of reward training stands in `reinforce/windows.py`, with what follows from it.)

`read` takes the text of a recipe and raises ValueError naming the option and how to write it. Nothing here
imports torch.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"


def matched(option: str, text: str | int, pattern: str, remedy: str) -> re.Match[str]:
    """The whole text matched, or ValueError: `option is 'text': remedy`."""
    match = re.fullmatch(pattern, str(text).strip())
    if match is None:
        raise ValueError(f"{option} is {text!r}: {remedy}")
    return match


class TimeSampling(NamedTuple):
    """The distribution of sigma: kind "logit_normal" or "uniform"; mean and std are the logit-normal's."""

    kind: str
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def read(cls, text: str) -> TimeSampling:
        """`logit_normal`, `logit_normal:MEAN,STD` or `uniform`."""
        match = matched(
            "time_sampling",
            text,
            rf"uniform|logit_normal(?::\s*({NUMBER})\s*,\s*({NUMBER}))?",
            "use one of logit_normal, logit_normal:MEAN,STD, uniform",
        )
        kind = text.strip().partition(":")[0]
        if match[1] is None:
            return cls(kind)
        mean, std = float(match[1]), float(match[2])
        if std < 0 or not math.isfinite(mean + std):
            raise ValueError(f"time_sampling is {text!r}: STD is a finite number, 0 or more")
        return cls(kind, mean, std)


class Counted(NamedTuple):
    """How many of something, and the weight of their loss."""

    count: int
    weight: float = 1.0

    @classmethod
    def read(cls, option: str, text: str | int) -> Counted:
        """`COUNT` or `COUNT@WEIGHT`; 0 is none."""
        match = matched(option, text, rf"(\d+)(?:@({NUMBER}))?", "write COUNT or COUNT@WEIGHT, such as 2@3")
        count, weight = int(match[1]), float(match[2] or 1)
        if count > 10_000 or weight < 0 or not math.isfinite(weight):
            raise ValueError(f"{option} is {text!r}: COUNT is at most 10000, WEIGHT finite and 0 or more")
        return cls(count, weight)


class ClassImages(NamedTuple):
    """Prior preservation: the folder of class images, their common prompt, how many, their loss's weight."""

    folder: str
    prompt: str
    count: int = 100
    weight: float = 1.0

    @classmethod
    def read(cls, text: str) -> ClassImages | None:
        """`FOLDER?prompt=WORDS[&count=N][@WEIGHT]`, or None for an empty text."""
        if not text.strip():
            return None
        match = matched(
            "class_images",
            text,
            r"(?s)(.+?)\?prompt=(.+?)(?:&count=(\d+))?(?:@(\d*\.?\d+))?",
            "write FOLDER?prompt=WORDS or FOLDER?prompt=WORDS&count=200@0.5",
        )
        count = int(match[3] or 100)
        if count < 1:
            raise ValueError(f"class_images is {text!r}: count is 1 or more")
        return cls(match[1], match[2], count, float(match[4] or 1))


class LossOn(NamedTuple):
    """Where the loss is taken: kind "all", "edited" or "weighted"; weight is the repainted area's."""

    kind: str
    weight: float = 1.0

    @classmethod
    def read(cls, text: str) -> LossOn:
        """`all`, `edited` or `weighted:WEIGHT`."""
        match = matched(
            "loss_on",
            text,
            rf"all|edited|weighted:\s*({NUMBER})",
            "use one of all, edited, weighted:WEIGHT, for example weighted:4",
        )
        kind, weight = text.strip().partition(":")[0], float(match[1] or 1)
        if weight < 0 or not math.isfinite(weight):
            raise ValueError(f"loss_on is {text!r}: WEIGHT is a finite number, 0 or more")
        return cls(kind, weight)
