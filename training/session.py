"""One training in this process, as `choices.py` orders it: a LoRA file, a curve, images and a report.

What the ComfyUI nodes and scripts share. Knows no ComfyUI (`comfy.py` does); the trainings themselves are
`trainer.py` and `reinforce/trainer.py`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .choices import is_small
from .config import TrainConfig
from .evaluate import history, plots
from .evaluate import preview as preview_of
from .evaluate import report as page
from .evaluate.history import History
from .reinforce.config import GRPOConfig
from .runtime import disk


@dataclass(frozen=True)
class Outcome:
    """What a run left: the LoRA file (None if it was stopped early), images as IMAGE [1,H,W,3], a report.

    curve: of the loss, or of the rollouts' reward; samples: the last sample images, or before and after.
    """

    lora: Path | None
    step: int
    curve: Tensor
    samples: Tensor | None
    report: str


@contextlib.contextmanager
def own_process_state(cpu: bool = False) -> Iterator[None]:
    """Keep torch's random state and accelerate's process-wide state out of the program that hosts the
    training.

    cpu: train on the CPU even where there is a GPU.
    """
    from accelerate.state import AcceleratorState, GradientState

    before = os.environ.get("ACCELERATE_USE_CPU")
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with torch.random.fork_rng():
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            if cpu and before is None:
                del os.environ["ACCELERATE_USE_CPU"]
            gc.collect()


def train(
    config: TrainConfig,
    *,
    on_step: Callable[[int, int, Tensor], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[Iterable, str], Iterable] | None = None,
    cpu: bool = False,
) -> Outcome:
    """Run (or go on with) a training in this process; by reward where it is a `GRPOConfig`.

    on_step(step, steps, preview): after every report, with the curve above the latest samples, [H,W,3].
    should_stop: asked after every step; a checkpoint is written before the run ends. progress wraps the
    caching loops. cpu: train there even if there is a GPU.
    """
    from .reinforce.trainer import GRPOTrainer
    from .trainer import Trainer

    by_reward = isinstance(config, GRPOConfig)
    logged = (history.rewards if by_reward else history.losses)(Path(config.output_dir))
    sheets: list[Tensor] = []

    def on_report(report: Any) -> None:
        value = history.mean_reward(trainer.measures) if by_reward else report.loss
        if math.isfinite(value):  # else nothing was judged
            logged[report.step] = value
        if on_step is not None:
            on_step(report.step, report.steps, preview(curve_of(config, logged), sheets[-1:]))

    trainer = (GRPOTrainer if by_reward else Trainer)(
        config,
        on_report=on_report,
        on_sample=lambda step, sheet: sheets.append(sheet),
        should_stop=should_stop,
        progress=progress,
    )
    with own_process_state(cpu):
        path = trainer.run()
        lora = path if path.suffix == ".safetensors" and path.is_file() else None
        samples = sheets[-1][None] if sheets else None
        if by_reward:
            samples = trainer.before_after(is_small(config.model)) if lora else None
            if samples is not None:
                _illustrate(trainer.output, samples[0])
        step, notes = trainer.step, trainer.data.notes
        trainer = None  # before its memory is collected
    report = _report(config, step, logged, path, notes)
    return Outcome(lora, step, curve_of(config, logged)[None], samples, report)


def _illustrate(run: Path, sheet: Tensor) -> None:
    """Keep a sheet [H,W,3] of before and after in the run's folder, and show it in the report."""
    with contextlib.suppress(OSError):
        preview_of.write(sheet, run / page.BEFORE_AFTER)
    page.attempt(run)


def curve_of(config: TrainConfig, logged: History) -> Tensor:
    """The loss of a supervised training, or the rollouts' mean reward, over the steps: [H,W,3]."""
    return plots.as_image(plots.curve(logged.items(), title=_curve_name(config)))[0]


def _curve_name(config: TrainConfig) -> str:
    return "reward of the rollouts" if isinstance(config, GRPOConfig) else "loss"


def preview(curve: Tensor, sheets: Sequence[Tensor]) -> Tensor:
    """[H,W,3]: the curve, and below it the samples [h,w,3] at its width if there are any."""
    if not sheets:
        return curve
    width = curve.shape[1]
    height = max(1, round(sheets[0].shape[0] * width / sheets[0].shape[1]))
    sheet = torch.nn.functional.interpolate(sheets[0].movedim(-1, 0)[None], (height, width), mode="nearest")
    return torch.cat([curve, sheet[0].movedim(0, -1)])


def _report(config: TrainConfig, step: int, logged: History, path: Path, notes: Sequence[str] = ()) -> str:
    """What was trained on what, and how it went; a line each.

    path: the LoRA; of a run that was stopped its checkpoint, or the run's folder if it has none.
    """
    by_reward, values = isinstance(config, GRPOConfig), list(logged.values())
    lora = path.is_file()
    tenth = max(1, len(values) // 10)
    what = _rollouts(config) if by_reward else _steps(config)
    lines = [f"{'trained' if lora else 'stopped at'} {step} of {config.max_steps} {what}"]
    if not lora:
        kept = f"checkpoint: {path}" if path != Path(config.output_dir) else "no checkpoint yet"
        lines += [kept, "to go on, run the node again with the same settings"]
    if by_reward:
        lines.append(f"rewards: {', '.join(config.rewards)}")
    fused = f" with {', '.join(config.fuse_loras)}" if config.fuse_loras else ""
    lines.append(f"base: {config.model} ({config.base_dtype}){fused}")
    lines += [f"data: {', '.join(config.data)}", *notes]
    if values:
        first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
        lines.append(f"{_curve_name(config)}: {first:.4f} at the start, {last:.4f} at the end")
    if lora and config.fuse_loras:
        lines.append("load it after the LoRA it started from, not instead of it")
    return "\n".join([*lines, f"run folder: {config.output_dir}"])


def _steps(c: TrainConfig) -> str:
    return (
        f"steps: {c.recipe}, rank {c.rank}, {c.optimizer} {c.lr:g}, {c.resolution} px, "
        f"batch {c.batch_size} x {c.accumulation}"
    )


def _rollouts(c: GRPOConfig) -> str:
    return (
        f"updates: {c.recipe} ({c.algorithm}), rank {c.rank}, lr {c.lr:g}, "
        f"{c.groups_per_update} groups of {c.group_size}, {c.rollout_steps} sampling steps"
    )


def publish(lora: Path, folder: Path, run: Path) -> Path:
    """Copy a finished LoRA into a folder of LoRAs and return where.

    The same run overwrites its own earlier file; a file of another origin is never overwritten: a number is
    added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = run / "published.txt"
    known = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
    target = folder / lora.name
    number = 2
    while target.exists() and target.name != known:
        target = folder / f"{lora.stem}_{number}{lora.suffix}"
        number += 1
    try:
        disk.write_whole(target, lambda place: shutil.copyfile(lora, place))
    except OSError as error:
        raise ValueError(
            f"the LoRA is whole in {lora}, but cannot be copied to {folder} ({disk.reason(error)}): copy it"
        ) from error
    note.write_text(target.name, encoding="utf-8")
    return target
