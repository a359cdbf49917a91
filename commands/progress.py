"""The one look of long work: a bar on a terminal, else a line now and then. Always on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

PAUSE = 30.0  # seconds between two lines where no terminal is; shorter work says nothing there
FORMAT = "{desc} |{bar}| {n_fmt} of {total_fmt} {unit}s, {elapsed}, {remaining} left{postfix}"


class Bar:
    """How far a piece of work is: label, done and total in units, time, time left, figures.

    A context manager; the total may grow or come later.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "step", done: int = 0):
        self.label, self.total, self.unit = label, total, unit
        self.first = self.done = done
        self.figures: dict[str, str] = {}
        self.started = self.said = time.monotonic()
        self._tqdm = self._shown() if sys.stderr.isatty() else None

    def _shown(self) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self.total,
            desc=self.label,
            unit=self.unit,
            initial=self.done,
            bar_format=FORMAT,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def advance(self, count: int = 1, **figures: float) -> None:
        """`count` more are done."""
        self.to(self.done + count, **figures)

    def more(self, count: int) -> None:
        """There are `count` more to do than was known."""
        self.total = (self.total or 0) + count
        self.to(self.done)

    def to(self, done: int, **figures: float) -> None:
        """`done` are done; figures that are given replace those that stand beside the bar."""
        step, self.done = done - self.done, done
        if figures:
            self.figures = {name: f"{value:.4g}" for name, value in figures.items()}
        if self._tqdm is not None:
            self._tqdm.total = self.total
            self._tqdm.set_postfix(self.figures, refresh=False)
            self._tqdm.update(step)
            if figures or step == 0:
                self._tqdm.refresh()
        elif time.monotonic() - self.said >= PAUSE:
            self._say()

    def close(self) -> None:
        """The work is over, done or not."""
        if self._tqdm is not None:
            self._tqdm.close()
            self._tqdm = None
        elif self.said > self.started:  # it was long enough for lines
            self._say()

    def _say(self) -> None:
        self.said = time.monotonic()
        sys.stderr.write(self.line(self.said - self.started) + "\n")
        sys.stderr.flush()

    def line(self, seconds: float) -> str:
        """What a log is told after so many seconds."""
        parts = [f"{self.done}{f' of {self.total}' if self.total else ''} {self.unit}s", clock(seconds)]
        made = self.done - self.first
        if self.total and made > 0 and self.done < self.total:
            parts.append(f"{clock(seconds / made * (self.total - self.done))} left")
        return f"{self.label}: {', '.join([*parts, *(f'{n} {value}' for n, value in self.figures.items())])}"


def clock(seconds: float) -> str:
    """Seconds as 1:02 or 1:00:02."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def over(items: Iterable, label: str, unit: str = "item") -> Iterator:
    """The items one by one, with a bar if there are several."""
    count = len(items) if isinstance(items, Sized) else None
    if count is not None and count < 2:
        yield from items
        return
    with Bar(label, count, unit) as bar:
        for item in items:
            yield item
            bar.advance()


def quiet() -> None:
    """One progress bar, ours: the libraries' own bars go, and, but for -vv, warnings about optional parts.

    Downloads keep their bars on a terminal.
    """
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        if logging.getLogger().level > logging.DEBUG:
            library.set_verbosity_error()
        library.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
