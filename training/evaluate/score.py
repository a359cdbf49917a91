"""How good a model is at editing, filling or reconstructing, in numbers: the figures of the README.

`QUESTIONS` says what is made of a case and measured; `score` streams batches of cases through a model and
collects one row of numbers per image. The command is `commands/score.py`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.denoiser import Denoiser
from . import measures, sampling
from .cases import Case, batches, stack
from .measures import Columns, Measure
from .plots import contact_sheet
from .sampling import ScoreSettings


@dataclass(frozen=True)
class Question:
    """What is asked of a model. make(denoiser, group of cases, settings, number of the batch): its images
    [N,H,W,3].

    headings, panels: what the contact sheet shows of a case and the image made for it. prepare: what becomes
    of a case before.
    """

    make: Callable[[Denoiser, Sequence[Case], ScoreSettings, int], Tensor]
    measure: Measure
    headings: tuple[str, ...]
    panels: Callable[[Case, Tensor], list[Tensor]]
    prepare: Callable[[Case], Case] = lambda case: case


def _prompts(group: Sequence[Case]) -> list[str]:
    return [case.sample.prompt for case in group]


def _captioned(case: Case) -> Case:
    return case._replace(sample=replace(case.sample, prompt=case.sample.caption or case.sample.prompt))


QUESTIONS = {
    # Every source edited by its instruction, beside the target image.
    "edit": Question(
        lambda denoiser, group, settings, number: sampling.edit(
            denoiser, stack(group, "source"), _prompts(group), settings, number
        ),
        measures.of_edits,
        ("source", "target", "edit"),
        lambda case, made: [case.sample.source, case.sample.target, made],
    ),
    # Every target image repainted inside its mask from its caption: what a base model must be able to do.
    "fill": Question(
        lambda denoiser, group, settings, number: sampling.fill(
            denoiser, stack(group, "target"), stack(group, "mask"), _prompts(group), settings, number
        ),
        measures.of_fills,
        ("masked", "original", "filled"),
        lambda case, made: [case.sample.masked_image, case.sample.target, made],
        _captioned,
    ),
    # Every target image encoded and decoded.
    "vae": Question(
        lambda denoiser, group, settings, number: sampling.reconstruct(denoiser, stack(group, "target")),
        measures.of_reconstructions,
        ("original", "decoded"),
        lambda case, made: [case.sample.target, made],
    ),
}


@dataclass
class Scores:
    """`rows`: one dict per image. `shown`: images and texts for the contact sheet. `notes`: what could not be
    measured or read, and why. `failure`: what ended the scoring before its end.
    """

    headings: tuple[str, ...] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)
    shown: list[tuple[list[Tensor], str]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    failure: Exception | None = None

    def add(self, group: Sequence[Case], columns: Columns) -> None:
        """Note the numbers, columns [N] by name, of the images made of a group of cases."""
        for row, case in enumerate(group):
            values = {name: column[row].item() for name, column in columns.items()}
            sample = case.sample
            self.rows.append({"name": sample.name, "prompt": sample.prompt, "task": sample.task} | values)

    def show(self, panels: list[Tensor], row: dict[str, Any]) -> None:
        """Put images [H,W,3] on the contact sheet, over the prompt and verdict of their row."""
        verdict = row.get("success", row.get("caption", row.get("checker")))
        mark = {True: "  [ok]", False: "  [miss]"}.get(verdict, "")
        self.shown.append((panels, row["prompt"] + mark))

    def columns(self) -> dict[str, list[float]]:
        """The numbers of all images by name; success also by kind of edit, as success/KIND."""
        columns: dict[str, list[float]] = defaultdict(list)
        for row in self.rows:
            for name, value in row.items():
                if isinstance(value, (bool, int, float)):
                    columns[name].append(float(value))
                    if name == "success" and row.get("task"):
                        columns[f"success/{row['task']}"].append(float(value))
        return columns

    def figures(self) -> dict[str, float]:
        """Means over the images for which a number is defined."""
        known = {name: [v for v in values if math.isfinite(v)] for name, values in self.columns().items()}
        return {name: sum(values) / len(values) for name, values in known.items() if values}

    def save(self, folder: str | Path, about: dict[str, Any]) -> Path:
        """Write score.json (figures, what was measured, every row) and contact-sheet.png; returns the JSON's
        path.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        report = {
            "figures": self.figures(),
            "pictures": len(self.rows),
            "about": about,
            "notes": self.notes,
            "rows": [{name: _json(value) for name, value in row.items()} for row in self.rows],
        }
        path = folder / "score.json"
        path.write_text(json.dumps(report, indent=1, allow_nan=False, default=str), encoding="utf-8")
        if self.shown:
            contact_sheet(self.shown, self.headings).save(folder / "contact-sheet.png")
        return path


def _json(value: Any) -> Any:
    """Undefined numbers as null: JSON knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def score(
    denoiser: Denoiser,
    cases: Iterable[Case],
    question: Question,
    settings: ScoreSettings,
    *,
    more: Sequence[Measure] = (),
    shown: int = 24,
) -> Scores:
    """Ask one of `QUESTIONS` of a model, batch by batch.

    denoiser: of `models/`. more: measures that add columns; shown: rows of the contact sheet. Raises
    ValueError if there are no cases, or the model does no such thing.
    """
    scores = Scores(question.headings)
    cases = (question.prepare(case) for case in cases)
    try:
        for number, group in enumerate(batches(cases, settings.batch)):
            if scores.rows and settings.should_stop is not None and settings.should_stop():
                break
            made = _made(denoiser, group, question, settings, number)
            columns: Columns = {}
            for measure in (question.measure, *more):
                columns |= measure(group, made)
            scores.add(group, columns)
            rows = scores.rows[-len(group) :][: shown - len(scores.shown)]
            for case, image, row in zip(group, made, rows, strict=False):
                scores.show(question.panels(case, image), row)
            if settings.on_scored is not None:
                settings.on_scored(len(scores.rows), scores.figures())
    except Exception as error:
        if not (settings.keep_partial and scores.rows):
            raise
        scores.failure = error
        scores.notes["ended early"] = f"after {len(scores.rows)} images: {error}"
    if not scores.rows:
        raise ValueError(
            "there is nothing to score: point --data at a folder with examples, or use --world shapes"
        )
    for name in scores.columns().keys() - scores.figures().keys():
        scores.notes[name] = "nothing to measure on any image"
    return scores


@torch.no_grad()
def _made(
    denoiser: Denoiser, group: Sequence[Case], question: Question, settings: ScoreSettings, number: int
) -> Tensor:
    """The images of batch `number`, [N,H,W,3] float32 on the CPU."""
    fast = torch.autocast(denoiser.device.type, torch.bfloat16) if settings.autocast else nullcontext()
    with fast:
        return question.make(denoiser, group, settings, number).float().cpu()
