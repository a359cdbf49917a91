"""What a command answers: words for people on stdout; with --json one JSON object, and nothing else there.

{"command": NAME, "exit_code": N, "result": {...}, "error": null or {"kind", "message"}}; docs/command-line.md
lists what `result` holds for each command. Sentences and progress go to stderr in either case.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("usage", "input", "fault", "stopped")  # exit codes 2, 2, 1 and 128 + the signal's number


@dataclass
class Answer:
    """How a command ended. result: what it made, by name; error: {"kind": one of `KINDS`, "message"}."""

    result: Mapping[str, Any] = field(default_factory=dict)
    code: int = 0
    error: Mapping[str, str] | None = None

    @classmethod
    def of(cls, returned: Any) -> Answer:
        """What a command's `run` returned: its result, an exit code, an answer, or nothing."""
        if isinstance(returned, Answer):
            return returned
        return cls(returned) if isinstance(returned, Mapping) else cls(code=returned or 0)

    @classmethod
    def failed(cls, kind: str, message: str, code: int, result: Mapping[str, Any] | None = None) -> Answer:
        """The answer of a command that could not do, or not end, its work."""
        return cls(result or {}, code, {"kind": kind, "message": message})

    def json(self, command: str) -> str:
        """One line of JSON in ASCII."""
        frame = {"command": command, "exit_code": self.code, "result": self.result, "error": self.error}
        return json.dumps(plain(frame), allow_nan=False)


def plain(value: Any) -> Any:
    """A value as JSON knows it: paths as text, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in an answer")


@contextlib.contextmanager
def aside(asked: bool) -> Iterator[None]:
    """Inside the block what is printed goes to stderr, if JSON was asked for."""
    with contextlib.redirect_stdout(sys.stderr) if asked else contextlib.nullcontext():
        yield


def write(answer: Answer, command: str) -> None:
    """Print the JSON of an answer."""
    sys.stdout.write(answer.json(command) + "\n")
