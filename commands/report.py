"""`diptych report`: the folder of a training or a score as one HTML page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add `diptych report` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "report",
        help="show the folder of a training or a score as one HTML page",
        description="Write one HTML file, without a server or a network: curves, sample images, before and "
        "after, figures, configuration, the command to go on. train, grpo and score write it by themselves; "
        "this does it for runs of earlier versions, or for a run as it is now.",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="output_dir of diptych train or grpo, --output of score")
    add("-o", "--output", type=Path, metavar="FILE.html", help="default FOLDER/report.html")
    add("--open", action="store_true", help="open it in the browser")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the report and print where it is. Raises ValueError for a folder without a run."""
    from ..training.evaluate import report, run_folder
    from ..training.runtime.disk import check_file

    output = args.output or args.folder / report.NAME
    training, scores = run_folder.read(args.folder)
    check_file(output)
    path = report.write(args.folder, output)
    sys.stdout.write(f"{path}\n")
    if args.open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    made: dict[str, Any] = {"report": path, "scores": [score.folder for score in scores]}
    if training is None:
        return made | {"step": None, "steps": None, "result": None, "command": None}
    facts = {"step": training.step, "steps": training.steps, "result": training.result}
    return made | facts | {"command": training.command or None}
