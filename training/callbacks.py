"""What a run tells its front end (a command, a node), and asks of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .runtime.processes import Progress, silent


@dataclass(frozen=True)
class Report:
    """One log line.

    loss: mean over the steps since the last one. grad_norm: of the last step, before clipping.
    """

    step: int
    steps: int
    loss: float
    grad_norm: float
    lr: float
    rows_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Callbacks:
    """All are optional.

    on_step(step), on_report(report), on_sample(step, image [H,W,3]): in the main process. should_stop: asked
    after every step of every process. progress(items, label): wraps the loops before the first step. command:
    what goes on with the run, for its report; "" where no command line began it.
    """

    on_report: Callable[[Report], None] | None = None
    on_step: Callable[[int], None] | None = None
    on_sample: Callable[[int, Tensor], None] | None = None
    should_stop: Callable[[], bool] = lambda: False
    progress: Progress = silent
    command: str = ""
