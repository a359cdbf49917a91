"""Subcommands of the `diptych` command line, one file each.

A subcommand module has `add_parser(subparsers)`, which ends with `parser.set_defaults(run=run)`, and
`run(args) -> int`. Add a new one to NAMES; other files here are their helpers.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

NAMES = ("edit", "train", "grpo", "score", "doctor")


def modules() -> list[ModuleType]:
    """The subcommand modules, in the order of the help text."""
    here = Path(__file__).parent
    return [import_module(f".{name}", __name__) for name in NAMES if (here / f"{name}.py").is_file()]
