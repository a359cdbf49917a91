"""Types of command-line values: finite, in their range, or refused by argparse with the option's name."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Iterator

from .. import missing

MOST_STEPS = 10_000
LARGEST_SEED = 2**63 - 1  # of a torch generator
LARGEST_SIDE = 16_384  # pixels


def whole(low: int | None = None, high: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers in low..high; it raises ArgumentTypeError for anything else."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"it is {text!r}: give a whole number") from None
        _check(value, low, high)
        return value

    return parse


def number(low: float | None = None, high: float | None = None) -> Callable[[str], float]:
    """A parser of finite numbers in low..high; it raises ArgumentTypeError for anything else."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"it is {text!r}: give a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"it is {text}: give a finite number")
        _check(value, low, high)
        return value

    return parse


def _check(value: float, low: float | None, high: float | None) -> None:
    if low is not None and value < low:
        raise argparse.ArgumentTypeError(f"it is {value}: give {low} or more")
    if high is not None and value > high:
        raise argparse.ArgumentTypeError(f"it is {value}: give at most {high}")


seed = whole(0, LARGEST_SEED)
steps = whole(1, MOST_STEPS)
positive = whole(1)
finite = number()


class Usage(SystemExit):
    """A command line that cannot be read: `sentence` says why, `command` is the subcommand's name or ""."""

    def __init__(self, prog: str, message: str):
        super().__init__(2)
        self.sentence = f"{prog}: {message}; see {prog} --help"
        self.command = " ".join(prog.split()[1:2])


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its subcommands, of theirs, and so on."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in dict.fromkeys(action.choices.values()):
                yield from parsers(each)


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence instead of a usage page and with the option that was probably meant."""

    def error(self, message: str) -> None:
        """Raise `Usage`, which ends the program with code 2."""
        raise Usage(self.prog, message)

    def parse_args(self, args=None, namespace=None):
        """As argparse, but an unknown option ends with what was probably meant."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._parser_of(values).error(self._parser_of(values).unknown(unknown[0]))
        return values

    def _parser_of(self, values: argparse.Namespace) -> Parser:
        """The subcommand's parser where one was chosen."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices.get(getattr(values, action.dest, None), self)
        return self

    def unknown(self, word: str) -> str:
        """What is wrong with a word that no option takes."""
        name = word.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(name, known, 1)
        kind = "option" if word.startswith("-") else "argument"
        return f"unknown {kind} {name}" + (f", did you mean {near[0]}?" if near else "")


def check_device(name: str | None) -> None:
    """Raise ValueError for a device that torch does not know or does not find here."""
    import torch

    try:
        device = torch.device(name or "cpu")
    except RuntimeError as error:
        raise ValueError(f"--device is {name}: use cuda, mps or cpu") from error
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type not in found:
        raise ValueError(f"--device is {name}: use cuda, mps or cpu")
    if found[device.type] <= (device.index or 0):
        if device.type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
            raise ValueError(f"--device is {name} but {missing.CUDA}, or use cpu")
        raise ValueError(
            f"--device is {name} but torch finds {found[device.type] or 'none'} here: use cpu, or see "
            "diptych doctor"
        )
