"""What a LoRA file says about itself, from its header and its layers; a header may hold anything."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping

from ...samplers.ddim import level_of_noise
from . import describe
from .delta import check_window
from .errors import printable
from .files import RawFile
from .weights import FullTensor, LoraInfo, Module

# What our own trainer's tasks are made for; it stores the base's path, which may be called anything.
_TASKS = {"fill": "FLUX.1 Fill", "kontext": "FLUX.1 Kontext"}
# Where trainers name the model they trained on.
_BASES = ("modelspec.architecture", "ss_base_model_version", "base_model", "base_model_name_or_path")


def info(
    raw: RawFile,
    ours: Mapping,
    modules: Mapping[str, Module],
    full: Mapping[str, FullTensor],
    styles: set[str],
    notes: list[str],
) -> LoraInfo:
    """The facts for the report; what a header states badly becomes a note."""
    ranks = Counter(m.rank for m in modules.values())
    rank = ranks.most_common(1)[0][0] if ranks else None
    scales = Counter(m.scale for m in modules.values())
    alpha = _finite(ours.get("alpha"))
    if alpha is None and rank:
        alpha = scales.most_common(1)[0][0] * rank
    if len(ranks) > 1:
        notes.append("ranks: " + ", ".join(f"{n} modules of rank {r}" for r, n in sorted(ranks.items())))
    if 0.0 in scales:
        notes.append(f"{scales[0.0]} modules have an alpha of 0: they change nothing")
    stated = _TASKS.get(str(ours.get("task"))) or _text(ours.get("base")) or _stated(raw)
    family = describe.guess_base(modules, full)
    window = _window(ours.get("sigma_window"), notes)
    if window is not None and family == describe.UNET and _of_first_version(ours):
        window = level_of_noise(window[0]), level_of_noise(window[1])
    return LoraInfo(
        format=describe.format_name(raw, styles),
        base=_text(ours.get("base")) or family,
        rank=rank,
        alpha=alpha,
        alpha_from=", ".join(Counter(m.scale_from for m in modules.values())),
        algorithm=_text(ours.get("algorithm")),
        reward=_text(ours.get("reward")),
        step=_step(ours.get("step"), raw),
        sigma_window=window,
        curve=_curve(ours.get("curve")),
        stated_base=stated,
    )


def _stated(raw: RawFile) -> str | None:
    places = [raw.header, *raw.sidecars.values()]
    return next((text for place in places for key in _BASES if (text := _text(place.get(key)))), None)


def _window(stored: object, notes: list[str]) -> tuple[float, float] | None:
    if stored is None:
        return None
    try:
        start, end = (float(v) for v in stored)
        check_window((start, end))
    except (TypeError, ValueError, OverflowError):
        notes.append(f"the sigma window in its header is {printable(stored)[:60]}, which is none: not used")
        return None
    return start, end


def _of_first_version(ours: Mapping) -> bool:
    """It stored the weight of the noise, sqrt(1 - alpha), for reward-trained Stable Diffusion."""
    return ours.get("version", 1) == 1 and ours.get("algorithm") == "grpo"


def _step(stored: object, raw: RawFile) -> int | None:
    for value in (stored, raw.sidecars.get("lora_config.json", {}).get("step")):
        if (number := _finite(value)) is not None:
            return int(number)
    return raw.step


def _curve(stored: object) -> tuple[tuple[int, float], ...]:
    """[[step, value], ...] of a header; what is not of that form is no curve."""
    if not isinstance(stored, list):
        return ()
    pairs = [tuple(map(_finite, pair)) for pair in stored if isinstance(pair, list) and len(pair) == 2]
    return tuple((int(a), b) for a, b in pairs if a is not None and b is not None)


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
        return None
    return value if math.isfinite(value) else None


def _text(value: object) -> str | None:
    text = value if value is None or isinstance(value, str) else json.dumps(value)
    return printable(text)[:300] if text else None
