"""What `diptych train` and `diptych grpo` share: a recipe, what is set over it, and the help on both."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from .completion import offer


class Help(argparse.Action):
    """`--help` with the recipes and their options below, which are looked up only then."""

    def __init__(self, options: Callable[[], str], **settings: Any):
        """options: gives the text below argparse's own."""
        super().__init__(nargs=0, default=argparse.SUPPRESS, **settings)
        self.options = options

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.print_help()
        sys.stdout.write(f"\n{self.options()}\n")
        parser.exit()


def recipe_help(summaries: dict[str, str], kind: type) -> str:
    """The recipes, each with its line, and every option of the configuration `kind`, in groups."""
    from ..training.runtime.options import WIDTH, listing

    column = max(map(len, summaries)) + 4
    lines = [
        textwrap.fill(text, WIDTH, initial_indent=f"  {name}".ljust(column), subsequent_indent=" " * column)
        for name, text in summaries.items()
    ]
    return "\n".join(
        [
            "Recipes (a file of your own begins with `extends: NAME`):",
            *lines,
            "",
            "Options of a recipe, NAME = DEFAULT; as `NAME: VALUE` in the file or as --set NAME=VALUE:",
            "",
            listing(kind),
        ]
    )


def add_recipe_arguments(
    parser: argparse.ArgumentParser,
    options: Callable[[], str],
    recipes: Callable[[], dict[str, str]],
    kind: Callable[[], type],
) -> None:
    """What every command with a recipe takes. options: what its help adds; recipes, kind: for completion, the
    bundled ones, each with its line, and their configuration.
    """
    recipe = parser.add_argument("recipe", nargs="?", help="YAML file or bundled recipe, for example icedit")
    offer(recipe, recipes)
    add_set(parser, "override a recipe option", kind)
    parser.add_argument("--resume", default=None, help="auto, or a checkpoint folder")
    parser.add_argument(
        *("-h", "--help", "--help-config"),
        action=Help,
        options=options,
        help="show this, the recipes and every option of a recipe",
    )


def add_set(parser: argparse.ArgumentParser, text: str, kind: Callable[[], type]) -> None:
    """Add --set KEY=VALUE, for the options of a configuration."""
    action = parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    offer(action, lambda: settings(kind()))


def settings(kind: type) -> dict[str, str]:
    """What --set takes of a configuration: `KEY=`, or `KEY=VALUE` where the values are known; each with its
    help."""
    found = {}
    for field in dataclasses.fields(kind):
        if field.name not in kind.unused:
            known = field.metadata["choices"] or (("true", "false") if field.type == "bool" else ("",))
            found |= {f"{field.name}={value}": field.metadata["help"] for value in known}
    return found


def overrides_of(args: argparse.Namespace) -> list[str]:
    """`--set` and `--resume` as KEY=VALUE. Raises ValueError without a recipe."""
    if not args.recipe:
        raise ValueError("recipe is missing: name a YAML file or a bundled recipe, or see --help")
    return list(args.set) + ([f"resume={args.resume}"] if args.resume is not None else [])
