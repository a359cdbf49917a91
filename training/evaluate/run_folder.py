"""What a folder of long work holds: of a training its log, images, configuration and result; of a score its
figures. Written by the trainers as `run.json`, read back for the report.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime import checkpoint, disk
from . import history
from .history import History

NOTE = "run.json"
SCORE = "score.json"
LOGS = ("metrics.jsonl", "rewards.jsonl")


@dataclass(frozen=True)
class Run:
    """A training, as far as it is.

    given: the options that are not at their defaults, all where that is not known. command: goes on with it,
    in the folder `at`; "" where a node started it. result: the weights, once they are written. columns: what
    was logged, by name. earlier: the stages before this one.
    """

    folder: Path
    step: int
    steps: int
    config: Mapping[str, Any]
    given: Mapping[str, Any]
    command: str = ""
    at: str = ""
    result: Path | None = None
    columns: Mapping[str, History] = field(default_factory=dict)
    earlier: tuple[Run, ...] = ()

    @property
    def by_reward(self) -> bool:
        """Whether it learns from rewards."""
        return "rewards" in self.config or (self.folder / LOGS[1]).is_file()

    @property
    def name(self) -> str:
        """The recipe's name, else the folder's."""
        return self.config.get("recipe") or self.folder.resolve().name


@dataclass(frozen=True)
class Score:
    """The figures of a model: what `Scores.save` wrote."""

    folder: Path
    figures: Mapping[str, float]
    notes: Mapping[str, str]
    about: Mapping[str, Any]
    rows: list[dict[str, Any]]


def note(config: Any, step: int, command: str = "", result: Path | None = None) -> None:
    """Write `run.json` into the output folder of a configuration: how far it is, and what it leaves."""
    folder = Path(config.output_dir)
    values = {
        "step": step,
        "steps": config.max_steps,
        "result": None if result is None else os.path.relpath(result, folder),
        "command": command,
        "at": os.getcwd() if command else "",
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "config": dataclasses.asdict(config),
        "given": given(config),
    }
    text = json.dumps(values, indent=1, default=str)
    disk.write_whole(folder / NOTE, lambda place: place.write_text(text, encoding="utf-8"))


def given(config: Any) -> dict[str, Any]:
    """The options of a configuration that are not at their defaults."""
    found = {}
    for each in dataclasses.fields(config):
        usual = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        if getattr(config, each.name) != usual:
            found[each.name] = getattr(config, each.name)
    return found


def read(folder: str | Path) -> tuple[Run | None, list[Score]]:
    """The training in a folder and the scores in or below it. Raises ValueError where there is neither."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give one that diptych train, grpo or score wrote")
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    stages = tuple(run for path in below if (run := _run(path)) is not None)
    run = _run(folder)
    if run is not None:
        run = dataclasses.replace(run, earlier=stages)
    elif stages:  # stopped in its first stage
        run = dataclasses.replace(stages[-1], earlier=stages[:-1])
    scores = [score for path in (folder, *below) if (score := _score(path)) is not None]
    if run is None and not scores:
        raise ValueError(
            f"{folder} holds no training and no score: give the output_dir of diptych train or grpo, or the "
            "--output of diptych score"
        )
    return run, scores


def _run(folder: Path) -> Run | None:
    """The training in a folder, of any version of the pack."""
    noted, kept = _json(folder / NOTE), {}
    for place in checkpoint.folders(folder / "checkpoints")[-1:]:
        with suppress(ValueError):
            kept = checkpoint.read_state(place)
    columns = history.columns(folder)
    if not (noted or kept or columns):
        return None
    config = noted.get("config") or kept.get("config") or {}
    logged = max((step for values in columns.values() for step in values), default=0)
    totals = columns.pop("steps", {})
    return Run(
        folder,
        step=max(noted.get("step", 0), kept.get("step", 0), logged),
        steps=int(config.get("max_steps") or (list(totals.values()) or [0])[-1]),
        config=config,
        given=noted.get("given") or config,
        command=noted.get("command", ""),
        at=noted.get("at", ""),
        result=_result(folder, noted),
        columns=columns,
    )


def _result(folder: Path, noted: Mapping[str, Any]) -> Path | None:
    if noted:
        found = folder / noted["result"] if noted.get("result") else None
        return found if found is not None and found.exists() else None
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    return files[-1] if files else folder / "model" if (folder / "model").is_dir() else None


def _score(folder: Path) -> Score | None:
    values = _json(folder / SCORE)
    if "figures" not in values:
        return None
    return Score(
        folder, *(values.get(name, {}) for name in ("figures", "notes", "about")), values.get("rows", [])
    )


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is none or it is cut short."""
    with suppress(OSError, ValueError):
        values = json.loads(file.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    return {}
