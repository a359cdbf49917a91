"""A run's folder as one HTML page: curves, images, configuration, and the command to go on.

One file without a server, a script or a link: curves are SVG, images are inside. Reads only what
`run_folder.read` finds, so that it can be written at any time, by a training and by `diptych report`.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..runtime import disk
from . import html, run_folder, svg
from .run_folder import Run, Score

logger = logging.getLogger(__name__)

NAME = "report.html"
BEFORE_AFTER = "before_after.png"  # what reward training changed
SHEETS = 5  # sample sheets shown of a run: the first, the last, and between
ROWS = 200  # of a score
UNTOLD = ("rows_per_second", "seconds_left", "grad_norm", "lr")  # not curves, or below the others


def write(folder: str | Path, output: Path | None = None) -> Path:
    """Write the report of a run's folder, by default into it; returns where. Raises ValueError for no run."""
    run, scores = run_folder.read(folder)
    text = page(run, scores)
    place = output or Path(folder) / NAME
    disk.write_whole(place, lambda part: part.write_text(text, encoding="utf-8"))
    return place


def attempt(folder: Path) -> Path | None:
    """As `write`, but no failure ends the work that is reported on: it is logged, and None returned."""
    try:
        return write(folder)
    except (OSError, ValueError) as error:
        logger.warning("the report of %s could not be written (%s)", folder, error)
        return None


def page(run: Run | None, scores: Sequence[Score]) -> str:
    """The whole page of a training, the scores below it, or scores alone."""
    name = run.name if run is not None else scores[0].folder.resolve().name
    parts: list[str] = []
    if run is not None:
        parts += [_state(run), _commands(run), _before_after(run), *_stage(run)]
        for stage in reversed(run.earlier):
            parts += [f"<h2>Stage before: {escape(stage.folder.name)}</h2>", _state(stage), *_stage(stage)]
    for score in scores:
        parts.append(_score(score, run is not None or len(scores) > 1))
    if run is not None:
        parts.append(_configuration(run))
    body = "\n".join(part for part in parts if part)
    return html.document(name, body)


# ---------------------------------------------------------------- a training


def _state(run: Run) -> str:
    what = "reward training" if run.by_reward else "training"
    how = "finished" if run.result is not None else "not finished"
    words = [f"{what} of {run.config['task']}" if run.config.get("task") else what]
    words += [f"step {run.step} of {run.steps}" if run.steps else f"step {run.step}", how]
    words += [f"in {run.folder.resolve()}", f"as of {time.strftime('%Y-%m-%d %H:%M')}"]
    return f'<p class="state">{escape(", ".join(words))}</p>'


def _commands(run: Run) -> str:
    """How to go on, or how to use what was made."""
    if run.result is not None:
        rows = [f"<p>Result: <code>{escape(str(run.result))}</code></p>"]
        command = use(run)
        rows.append(f"<pre>{escape(command)}</pre>" if command else "")
        if run.result.is_file():
            rows.append(
                "<p>In ComfyUI: put it into <code>models/loras</code>, load it with GRPO LoRA Loader.</p>"
            )
        more = "More steps, with a larger <code>max_steps</code>:"
    else:
        rows, more = [], "To go on:"
    if run.command:
        rows.append(f"<p>{more}</p><pre>{escape(f'cd {shlex.quote(run.at)}')}\n{escape(run.command)}</pre>")
    else:
        rows.append(f"<p>{more} run it again with the same settings and <code>resume: auto</code>.</p>")
    return "\n".join(rows)


def use(run: Run) -> str:
    """The command that tries the result of a finished training; "" where a command has no use for it."""
    task, result = run.config.get("task"), str(run.result)
    if task == "multimodal":
        return shlex.join(["diptych", "generate", "a red circle", "--model", result])
    model = ["--model", str(run.config.get("model"))]
    if run.result.is_dir():
        model = ["--model", result]
    if task in ("fill", "kontext"):
        loras = [] if run.result.is_dir() else [*run.config.get("fuse_loras", []), result]
        words = ["diptych", "edit", "photo.png", "what to change", "--engine", task, *model]
        return shlex.join(words + [word for lora in loras for word in ("--lora", lora)])
    if task in ("sd_inpaint", "glid") and run.result.is_dir():
        words = ["diptych", "inpaint", "photo.png", "what it shows", "--mask", "mask.png", "--engine", task]
        return shlex.join(words + model)
    return ""


def _before_after(run: Run) -> str:
    file = run.folder / BEFORE_AFTER
    return f"<h2>Before and after</h2>{html.figure(file, '')}" if file.is_file() else ""


def _stage(run: Run) -> list[str]:
    """Curves and samples of one run."""
    charts = [chart for title, series in curves(run) if (chart := svg.chart(title, series, title != "lr"))]
    drawn = f'<h2>Curves</h2><div class="row">{"".join(charts)}</div>' if charts else ""
    sheets = sorted((run.folder / "samples").glob("step_*.png"))
    chosen = [sheets[index] for index in svg.spread(len(sheets), SHEETS)]
    shown = "".join(
        html.figure(file, f"after {int(file.stem.partition('_')[2] or 0)} steps") for file in chosen
    )
    return [drawn, f'<h2>Samples</h2><div class="row">{shown}</div>' if shown else ""]


def curves(run: Run) -> Iterable[tuple[str, Mapping[str, run_folder.History]]]:
    """The charts of a run, (title, series by name): what counts first."""
    columns = dict(run.columns)
    for name in [name for name in columns if name.startswith("reward/")]:
        plain = name.partition("/")[2]
        series = {"rollouts": columns.pop(name), "held out": columns.pop(f"held_out/{plain}", {})}
        yield f"reward: {plain}", series if series["held out"] else {"": series["rollouts"]}
    last = [name for name in UNTOLD[2:] if name in columns]
    for name in [*(name for name in columns if name not in UNTOLD), *last]:
        yield name, {"": columns[name]}


def _configuration(run: Run) -> str:
    rest = {name: value for name, value in run.config.items() if name not in run.given}
    usual = (
        f"<details><summary>{len(rest)} at their defaults</summary>{html.table(rest)}</details>"
        if rest
        else ""
    )
    return f"<h2>Configuration</h2>{html.table(run.given)}{usual}" if run.given else ""


# ---------------------------------------------------------------- a score


def _score(score: Score, beside: bool) -> str:
    """Figures, contact sheet and rows."""
    title = f"Score: {score.folder.name}" if beside else "Score"
    command = f"<pre>{escape(score.about['command'])}</pre>" if score.about.get("command") else ""
    about = {
        name: value for name, value in score.about.items() if name != "command" and value not in (None, "")
    }
    sheet = score.folder / "contact-sheet.png"
    parts = [f"<h2>{escape(title)}</h2><p>{len(score.rows)} images</p>", html.table(score.figures), command]
    parts += [html.figure(sheet, "") if sheet.is_file() else "", _distribution(score.rows)]
    parts += [html.table(score.notes), f"<h2>What was scored</h2>{html.table(about)}", _rows(score.rows)]
    return "\n".join(part for part in parts if part)


def _distribution(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every measure's values in rising order: how many images lie below what."""
    charts = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        numbers = sorted(v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool))
        if len(numbers) > 1 and numbers[0] < numbers[-1] and name not in ("index", "number"):
            charts.append(svg.chart(f"{name}, images in order", {"": dict(enumerate(numbers, 1))}, False))
    return f'<div class="row">{"".join(charts)}</div>' if charts else ""


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.value(row.get(name))}</td>" for name in names) + "</tr>"
        for row in rows[:ROWS]
    )
    said = f"the first {ROWS} of {len(rows)} images" if len(rows) > ROWS else "every image"
    return f"<details><summary>{said}</summary><table><tr>{head}</tr>{body}</table></details>" if rows else ""
