"""Ctrl-C, SIGTERM and SIGHUP as a wish: the work under way is finished and kept, then the command ends.

Before the work begins, and at the second wish, the command ends at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")


class Stopped(KeyboardInterrupt):
    """The command was stopped by a signal; says what there is and how to go on. made: the same by name."""

    def __init__(self, number: int, sentence: str, **made: Any):
        super().__init__(sentence)
        self.code, self.made = 128 + number, made


class Stop:
    """A context in which the signals are heard.

    Until `asked` is called for the first time, a signal raises `Stopped` where the program is: nothing is
    lost then. From then on whoever asks is trusted to end soon, and only a second signal ends at once.
    """

    def __init__(self, nothing_lost: str, heard: str = ""):
        """nothing_lost: said of an end before the first question. heard: said at once of a later signal."""
        self.nothing_lost, self.heard = nothing_lost, heard
        self.signal = 0
        self._heeded = self._hurried = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup keeps its meaning
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether to stop; for a trainer's `should_stop`."""
        self._heeded = True
        return bool(self.signal)

    def _hear(self, number: int, frame: Any) -> None:
        if not self._heeded:
            raise Stopped(number, self.nothing_lost)
        if self.signal and not _launched():  # a launcher passes on what the terminal has already sent
            if self._hurried:
                os._exit(128 + number)
            self._hurried = True
            raise Stopped(number, "stopped at once")
        if not self.signal and _first():
            sys.stderr.write(f"\n{self.heard}; once more ends at once\n")
        self.signal = number


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1") or 1) > 1


def _first() -> bool:
    return os.environ.get("RANK", "0") in ("0", "")
