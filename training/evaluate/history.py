"""What a run logged about itself: losses and rewards by step, read back from its folder.

`metrics.jsonl` and `rewards.jsonl` grow over all parts of a run that was resumed; a step that was made again
counts as it was made last. Lines that a kill or a full disk cut short are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

History = dict[int, float]  # values by step, in the order of the steps


def losses(folder: Path) -> History:
    """The mean losses of the log lines of a run's folder; empty where there are none."""
    return _read(folder / "metrics.jsonl", lambda row: float(row["loss"]))


def rewards(folder: Path) -> History:
    """The mean over the rewards of the rollouts of every logged update where any could be judged."""
    return _read(folder / "rewards.jsonl", mean_reward)


def mean_reward(measures: Mapping[str, Any]) -> float:
    """The mean over the rewards of an update's measures, `reward/NAME`; NaN if nothing was judged."""
    values = [value for name, value in measures.items() if name.startswith("reward/")]
    return sum(values) / len(values) if values else math.nan


def columns(folder: Path) -> dict[str, History]:
    """Every number that a run logged, by name: those of `metrics.jsonl`, then those of `rewards.jsonl`."""
    found: dict[str, History] = {}
    for name in ("metrics.jsonl", "rewards.jsonl"):
        for row in _rows(folder / name):
            for key, value in row.items():
                if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                    found.setdefault(key, {})[int(row["step"])] = float(value)
    return {name: dict(sorted(values.items())) for name, values in found.items()}


def _read(file: Path, value: Callable[[dict[str, Any]], float]) -> History:
    found: History = {}
    for row in _rows(file):
        with suppress(ValueError, KeyError, TypeError):
            if math.isfinite(number := value(row)):
                found[int(row["step"])] = number
    return dict(sorted(found.items()))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a log that say which step they are of."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row
