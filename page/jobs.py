"""Work that shows how far it is and stops when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Stopped(Exception):
    """The user stopped the work; says where."""


class Job:
    """One run: counts steps for whoever looks on, and ends at the next step once `stop` was called."""

    def __init__(self, tell: Callable[[int, int], Any] | None = None, what: str = ""):
        """tell: given the steps done and the steps in all, after each. what: its kind of work."""
        self.done = self.total = 0
        self.what = what
        self._tell, self._asked = tell, threading.Event()

    def stop(self) -> None:
        """Ask it to end; from any thread."""
        self._asked.set()

    def more(self, steps: int) -> None:
        """There are so many more steps to do. Raises Stopped if it was asked to end."""
        self.total += steps
        self._check()

    def step(self, count: int = 1) -> None:
        """So many steps were done. Raises Stopped if it was asked to end."""
        self.done += count
        if self._tell is not None:
            self._tell(self.done, self.total)
        self._check()

    def _check(self) -> None:
        if self._asked.is_set():
            raise Stopped(f"stopped after {self.done} of {self.total} steps: nothing was changed")


class Jobs:
    """Who runs what. All visitors share the model, so their jobs run one after another."""

    def __init__(self):
        self._turn = threading.Lock()
        self._running: list[tuple[str, Job]] = []

    def run(
        self,
        visitor: str,
        work: Callable[[Job], Any],
        tell: Callable[[int, int], Any] | None = None,
        what: str = "",
    ) -> Any:
        """What `work` returns, when it is its turn. Raises whatever it raises, Stopped too."""
        mine = (visitor, Job(tell, what))
        self._running.append(mine)
        try:
            with self._turn:
                mine[1].more(0)
                return work(mine[1])
        finally:
            self._running.remove(mine)

    def stop(self, visitor: str, what: str | None = None) -> list[Job]:
        """Ask a visitor's jobs, of one kind or all, to end at their next step; returns them."""
        jobs = [job for who, job in list(self._running) if who == visitor and what in (None, job.what)]
        for job in jobs:
            job.stop()
        return jobs
