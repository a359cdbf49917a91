"""How good a model is at editing, filling or reconstructing, in numbers: the figures of the README.

One function per question (`score_edits`, `score_fill`, `score_vae`), each streaming batches of cases through
a denoiser and collecting one row of numbers per picture. What is measured stands in `judges.py`; the command
is `commands/score.py`.
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

from . import judges
from .judges import Case, Judge, stack


@dataclass(frozen=True)
class Settings:
    """How pictures are made. guidance and cfg: None is the model family's own. autocast: compute in bfloat16.

    The noise comes from `seed` and the number of the batch, so a figure belongs to a seed and a batch size.
    """

    steps: int = 12
    seed: int = 0
    batch: int = 50
    guidance: float | None = None
    cfg: float | None = None
    autocast: bool = False
    at_sigma: Callable[[float], None] | None = None
    progress: bool = True
    should_stop: Callable[[], bool] | None = None  # asked before every batch but the first
    keep_partial: bool = False  # an error after the first batch becomes `Scores.failure` instead of raising

    def sampling(self, number: int):
        """Of batch `number`."""
        from ...models.editing import Sampling

        return Sampling(self.steps, seed=self.seed * 100_003 + number, at_sigma=self.at_sigma)


@dataclass
class Scores:
    """`rows`: one dict per picture. `shown`: pictures and texts for the contact sheet. `notes`: what could
    not be measured or read, and why. `failure`: what ended the scoring before its end.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    shown: list[tuple[list[Tensor], str]] = field(default_factory=list)
    headings: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)

    failure: Exception | None = None

    def add(
        self,
        group: Sequence[Case],
        made: Tensor,
        numbers: judges.Numbers,
        show: Callable[[Case, Tensor], list[Tensor]],
        shown: int,
    ) -> None:
        """Note the numbers, columns [N] by name, of the pictures made [N,H,W,3]; the first to show."""
        for row, case in enumerate(group):
            values = {name: column[row].item() for name, column in numbers.items()}
            sample = case.sample
            self.rows.append({"name": sample.name, "prompt": sample.prompt, "task": sample.task} | values)
            if len(self.shown) < shown:
                verdict = values.get("success", values.get("caption", values.get("checker")))
                mark = {True: "  [ok]", False: "  [miss]"}.get(verdict, "")
                self.shown.append((show(case, made[row]), sample.prompt + mark))

    def figures(self) -> dict[str, float]:
        """Means over the pictures for which a number is defined; success also by kind of edit."""
        columns: dict[str, list[float]] = defaultdict(list)
        for row in self.rows:
            for name, value in row.items():
                if isinstance(value, (bool, int, float)) and math.isfinite(value):
                    columns[name].append(float(value))
                    if name == "success" and row.get("task"):
                        columns[f"success/{row['task']}"].append(float(value))
        return {name: sum(values) / len(values) for name, values in columns.items()}

    def save(self, folder: str | Path, about: dict[str, Any]) -> Path:
        """Write score.json (figures, what was measured, every row) and contact-sheet.png; returns the JSON's
        path.
        """
        from .plots import contact_sheet

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


def edit(
    denoiser: Any,
    sources: Tensor,
    instructions: Sequence[str],
    settings: Settings = Settings(),
    number: int = 0,
) -> Tensor:
    """Edited pictures [N,H,W,3] for sources [N,H,W,3] (sides multiples of 16) and one instruction each.

    FLUX Fill edits in a diptych (ICEdit), Kontext with the source as its reference; `number` is the batch's.
    Raises ValueError for a model that does neither.
    """
    from ...models import diptych, editing
    from ...models.flux_fill import FluxFill
    from ...models.flux_kontext import FluxKontext

    guidance, sampling = settings.guidance, settings.sampling(number)
    if isinstance(denoiser, FluxKontext):
        guidance = editing.KONTEXT_GUIDANCE if guidance is None else guidance
        return editing.edit_with_kontext(
            denoiser, sources, list(instructions), panel_width=0, guidance=guidance, sampling=sampling
        ).image
    if not isinstance(denoiser, FluxFill):
        raise ValueError(f"{type(denoiser).__name__} does not follow instructions: score it as fill or vae")
    built = diptych.build(sources, panel_width=0)
    prompts = [diptych.format_prompt(words) for words in instructions]
    guidance = editing.ICEDIT_GUIDANCE if guidance is None else guidance
    canvas = editing.fill_canvas(
        denoiser, built.image, built.mask, prompts, guidance=guidance, sampling=sampling
    )
    return diptych.split(canvas, built.layout, paste="panel").edited


def fill(
    denoiser: Any,
    images: Tensor,
    masks: Tensor,
    captions: Sequence[str],
    settings: Settings = Settings(),
    number: int = 0,
) -> Tensor:
    """Pictures [N,H,W,3] repainted where masks [N,H,W] are 1, by FLUX Fill or SD inpainting."""
    from ...models import editing
    from ...models.sd_inpaint import SDInpaint

    sampling = settings.sampling(number)
    if isinstance(denoiser, SDInpaint):
        cfg = {} if settings.cfg is None else {"cfg": settings.cfg}
        return editing.inpaint_sd(denoiser, images, masks, list(captions), sampling=sampling, **cfg)
    guidance = editing.FILL_GUIDANCE if settings.guidance is None else settings.guidance
    return editing.fill_canvas(denoiser, images, masks, list(captions), guidance=guidance, sampling=sampling)


def score_edits(
    denoiser: Any,
    cases: Iterable[Case],
    settings: Settings = Settings(),
    *,
    more: Sequence[Judge] = (),
    total: int | None = None,
    shown: int = 24,
) -> Scores:
    """Edit every source by its instruction and compare with the target.

    `kept_l1` (distance to the source outside the edit, lower is better), `psnr` and `ssim` (to the target);
    in the shapes world also `made`, `kept` and `success` (both). `more` judges add columns; `shown` rows go
    on the sheet.
    """
    return _run(
        denoiser,
        cases,
        settings,
        lambda group, number: edit(denoiser, stack(group, "source"), _prompts(group), settings, number),
        (judges.edit_numbers, *more),
        (("source", "target", "edit"), lambda case, made: [case.sample.source, case.sample.target, made]),
        total,
        shown,
    )


def score_fill(
    denoiser: Any,
    cases: Iterable[Case],
    settings: Settings = Settings(),
    *,
    more: Sequence[Judge] = (),
    total: int | None = None,
    shown: int = 24,
) -> Scores:
    """Repaint every target inside its mask from its caption: what a base model must be able to do.

    `kept_l1` outside the mask; in the shapes world `caption`: the masked places show what the caption says.
    """
    captioned = (
        c._replace(sample=replace(c.sample, prompt=c.sample.caption or c.sample.prompt)) for c in cases
    )
    return _run(
        denoiser,
        captioned,
        settings,
        lambda group, number: fill(
            denoiser, stack(group, "target"), stack(group, "mask"), _prompts(group), settings, number
        ),
        (judges.fill_numbers, *more),
        (
            ("masked", "original", "filled"),
            lambda case, made: [case.sample.masked_image, case.sample.target, made],
        ),
        total,
        shown,
    )


def score_vae(
    denoiser: Any,
    cases: Iterable[Case],
    settings: Settings = Settings(),
    *,
    total: int | None = None,
    shown: int = 24,
) -> Scores:
    """Encode and decode every target: `psnr`, `ssim`, and in the shapes world `checker`: it still reads the
    scene.
    """
    return _run(
        denoiser,
        cases,
        settings,
        lambda group, number: denoiser.decode(denoiser.encode(stack(group, "target"))),
        (judges.vae_numbers,),
        (("original", "decoded"), lambda case, made: [case.sample.target, made]),
        total,
        shown,
    )


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (bool, int, float)):
                columns[name].append(float(value))
    return columns


def _prompts(group: Sequence[Case]) -> list[str]:
    return [case.sample.prompt for case in group]


def _run(denoiser, cases, settings, make, measure, sheet, total, shown) -> Scores:
    """Batch by batch: make the pictures, measure them, keep the first few for the contact sheet."""
    from tqdm.auto import tqdm

    headings, show = sheet
    scores = Scores(headings=headings)
    with tqdm(total=total, desc="scoring", unit="picture", disable=not settings.progress) as bar:
        try:
            for number, group in enumerate(judges.batches(cases, settings.batch)):
                stopped = settings.should_stop is not None and settings.should_stop()
                if stopped and scores.rows:
                    break
                fast = (
                    torch.autocast(denoiser.device.type, torch.bfloat16)
                    if settings.autocast
                    else nullcontext()
                )
                with torch.no_grad(), fast:
                    made = make(group, number).float().cpu()
                numbers = {}
                for judge in measure:
                    numbers |= judge(group, made)
                scores.add(group, made, numbers, show, shown)
                bar.update(len(group))
                bar.set_postfix({k: f"{v:.3f}" for k, v in scores.figures().items() if "/" not in k})
        except Exception as error:
            if not (settings.keep_partial and scores.rows):
                raise
            scores.failure = error
            scores.notes["ended early"] = f"after {len(scores.rows)} pictures: {error}"
    for name, values in _columns(scores.rows).items():
        if not any(math.isfinite(value) for value in values):
            scores.notes[name] = "nothing to measure on any image"
    if not scores.rows:
        raise ValueError(
            "there is nothing to score: point --data at a folder with examples, or use --world shapes"
        )
    return scores
