"""What a run logged about itself: losses and rewards by step, read back from its folder.

`metrics.jsonl` and `rewards.jsonl` grow over all parts of a run that was resumed; a step that was made again
counts as it was made last. Lines that a kill or a full disk cut short are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
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


def _read(file: Path, value: Callable[[dict[str, Any]], float]) -> History:
    found: History = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if math.isfinite(number := value(row)):
                found[int(row["step"])] = number
    return dict(sorted(found.items()))
