"""The `diptych` command: assembles the subcommands of `commands/`, nothing else.

Each module there offers `add_parser(subparsers)` and `run(args) -> int`; heavy imports stay inside `run`.
"""

from __future__ import annotations

import argparse
import sys

from . import __version__, commands


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diptych", description="Edit images by instruction; train and score edit models."
    )
    parser.add_argument("--version", action="version", version=f"comfyui-diptych {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in commands.modules():
        module.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code. User errors are one line on stderr and exit code 2."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, FileNotFoundError) as error:
        print(f"diptych {args.command}: {error}", file=sys.stderr)
        return 2
