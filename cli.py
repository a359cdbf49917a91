"""The `diptych` command: assembles the subcommands of `commands/`, and says in one sentence why one ended.

Each module there offers `add_parser(subparsers)` and `run(args)`, which returns what it made, by name;
heavy imports stay inside `run`.
"""

from __future__ import annotations

import argparse
import sys

from . import __version__, commands, failures
from .commands import answers, logs, streams, values
from .commands.answers import Answer
from .commands.stopping import Stopped

CODES = """exit codes:
  0         done
  1         a fault of this program, or what diptych doctor found
  2         something to mend in the command line or in what it names, said in one sentence
  128 + N   stopped by signal N: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP"""
COMMON = (
    (("--json",), {"action": "store_true"}, "print one JSON object on stdout, nothing else there"),
    (("-v", "--verbose"), {"action": "count"}, "log what is being done; -vv also what libraries log"),
    (("--debug",), {"action": "store_true"}, "show the traceback of an error"),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `diptych` with every subcommand of `commands/`."""
    parser = values.Parser(
        prog="diptych",
        description="Edit images by instruction; train and score edit models.",
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"comfyui-diptych {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in commands.modules():
        module.add_parser(subparsers)
    for each in values.parsers(parser):
        for names, settings, text in COMMON:
            each.add_argument(*names, **settings, default=argparse.SUPPRESS, help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code, see `CODES`. Raises SystemExit for a wrong command line."""
    words = sys.argv[1:] if argv is None else list(argv)
    with streams.lasting():
        try:
            parser = build_parser()
            args = parser.parse_args(words, argparse.Namespace(json=False, verbose=0, debug=False))
        except values.Usage as usage:
            sys.stderr.write(f"{usage.sentence}\n")
            if "--json" in words:
                answers.write(Answer.failed("usage", usage.sentence, 2), usage.command)
            raise
        args.words, args.parser = words, parser
        logs.begin(args.verbose)
        with answers.aside(args.json):
            answer = _answer(args)
        if args.json and _speaks():
            answers.write(answer, args.command)
        return answer.code


def _answer(args: argparse.Namespace) -> Answer:
    """What a subcommand made, or in one sentence, which is also written to stderr, why it did not."""
    try:
        return Answer.of(args.run(args))
    except Stopped as stopped:
        answer = Answer.failed("stopped", str(stopped), stopped.code, stopped.made)
    except KeyboardInterrupt:
        answer = Answer.failed("stopped", "stopped", 130)
    except Exception as error:
        if args.debug:
            raise
        failure = failures.explain(error)
        kind, code = ("fault", 1) if failure.ours else ("input", 2)
        answer = Answer.failed(kind, failure.sentence, code)
    if answer.error["message"]:
        sys.stderr.write(f"diptych {args.command}: {answer.error['message']}\n")
    return answer


def _speaks() -> bool:
    """Whether this is the process of a launched training that answers."""
    from .training.runtime.lock import is_main_process

    return is_main_process()
