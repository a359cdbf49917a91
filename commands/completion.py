"""`diptych completion SHELL`: what the Tab key completes, from the parsers of all commands as they are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from . import shells, values
from .shells import Option, Place

WHERE = {
    "bash": "~/.local/share/bash-completion/completions/diptych",
    "zsh": '"${fpath[1]}/_diptych"',
    "fish": "~/.config/fish/completions/diptych.fish",
}


def add_parser(subparsers: Any) -> None:
    """Add `diptych completion` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "completion",
        help="print the completion script of a shell",
        description="Print what lets the Tab key complete commands, options, their values, names of recipes "
        "and what --set takes. Once, and again after an update: "
        + "; ".join(f"diptych completion {shell} > {place}" for shell, place in WHERE.items()),
    )
    parser.add_argument("shell", choices=tuple(WHERE), help="whose script")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the script. args.parser: of the whole command line."""
    script = shells.WRITERS[args.shell](places(args.parser))
    sys.stdout.write(script)
    return {"shell": args.shell, "script": script}


def offer(action: argparse.Action, words: Callable[[], dict[str, str]]) -> None:
    """Let the value of an argument be completed by these words, which are looked up only then."""
    action.offered = words


def places(parser: argparse.ArgumentParser) -> list[Place]:
    """The parser and those below it, as what may stand where."""
    return [_place(each, each.prog.partition(" ")[2]) for each in values.parsers(parser)]


def _place(parser: argparse.ArgumentParser, name: str) -> Place:
    options, words = [], {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words |= {each.dest: each.help or "" for each in action._choices_actions}
        elif not action.option_strings:
            words |= _values(action)
        elif action.help != argparse.SUPPRESS:
            takes = action.nargs != 0
            about = parser._get_formatter()._expand_help(action) if action.help else ""
            options.append(
                Option(tuple(action.option_strings), about, takes, _values(action) if takes else {})
            )
    return Place(name, tuple(options), words)


def _values(action: argparse.Action) -> dict[str, str]:
    offered = getattr(action, "offered", None)
    return offered() if offered is not None else {str(choice): "" for choice in action.choices or ()}
