"""The `diptych` command: assembles the subcommands of `commands/`, and says in one sentence why one ended.

Each module there offers `add_parser(subparsers)` and `run(args) -> int`; heavy imports stay inside `run`.
"""

from __future__ import annotations

import argparse
import logging
import sys

from . import __version__, commands
from .commands import failures, streams, values
from .commands.stopping import Stopped


def build_parser() -> argparse.ArgumentParser:
    """The parser of `diptych` with every subcommand of `commands/`."""
    parser = values.Parser(
        prog="diptych", description="Edit images by instruction; train and score edit models."
    )
    parser.add_argument("--version", action="version", version=f"diptych {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in commands.modules():
        module.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        subparser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code.

    2: something the user can mend, said in one sentence on stderr; 1: a fault of ours; 128 + N: stopped by
    signal N (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP).
    """
    with streams.lasting():
        args = build_parser().parse_args(argv)
        args.words = sys.argv[1:] if argv is None else list(argv)
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        try:
            return args.run(args) or 0
        except Stopped as stopped:
            if str(stopped):
                _say(args, str(stopped))
            return stopped.code
        except KeyboardInterrupt:
            _say(args, "stopped")
            return 130
        except Exception as error:
            if args.debug:
                raise
            failure = failures.explain(error)
            _say(args, failure.sentence)
            return 1 if failure.ours else 2


def _say(args: argparse.Namespace, sentence: str) -> None:
    sys.stderr.write(f"diptych {args.command}: {sentence}\n")
