"""`diptych train RECIPE`: supervised training from a YAML recipe, with live progress."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from .logs import speak
from .progress import Bar, over, quiet
from .recipe_options import add_recipe_arguments, overrides_of, recipe_help
from .stopping import Stop, Stopped

WORLD_TASKS = {"vae": ("tiny.vae", "VaeRecipe"), "text": ("tiny.text", "TextRecipe")}


def add_parser(subparsers: Any) -> None:
    """Add `diptych train` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "train",
        add_help=False,
        help="train a LoRA, MoE-LoRA or full model from a recipe",
        description="Train from a YAML recipe (a file or a bundled name). Several GPUs or machines: "
        "accelerate launch -m comfyui_diptych train RECIPE ...",
    )
    add_recipe_arguments(parser, options_of_training, recipes_of_training, _kind)
    parser.set_defaults(run=run)


def options_of_training() -> str:
    """What `diptych train --help` adds: the recipes and every option."""
    from ..training.config import TrainConfig

    return recipe_help(recipes_of_training(), TrainConfig)


def recipes_of_training() -> dict[str, str]:
    """The bundled recipes that are not for `diptych grpo`, each with its line."""
    from ..training import recipes

    return {name: text for name, text in recipes.summaries().items() if not name.startswith("grpo_")}


def _kind() -> type:
    """A configuration with every option that a recipe may have."""
    from ..training.config import MultimodalTrainConfig

    return MultimodalTrainConfig


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train by a recipe. Raises `Stopped` after a signal, ValueError for a wrong recipe."""
    from ..training import recipes

    overrides = overrides_of(args)
    speak()
    quiet()
    values = recipes.read(args.recipe, overrides)
    if values.get("task") in WORLD_TASKS:
        return _train_world(values)
    made: dict[str, Any] = {}
    for config in recipes.from_dict(values).runs():
        made = _train(config, args)
    return made


def _train(config: Any, args: argparse.Namespace) -> dict[str, Any]:
    """One run of the trainer. Raises `Stopped` after a signal."""
    with training_stop() as stop:
        from ..training.trainer import Trainer

        with Steps(config.max_steps) as bar:
            trainer = Trainer(
                config,
                on_step=bar.advance,
                on_report=bar.report,
                progress=over,
                should_stop=stop.asked,
                command=going_on(args),
            )
            path = trainer.run()
        if path == trainer.output or path.parent == trainer.checkpoints:
            raise stopped(args, trainer, path, stop)
    if trainer.processes.main:
        sys.stdout.write(f"{path}\n")
    return finished(trainer, path)


def finished(trainer: Any, path: Path) -> dict[str, Any]:
    """What a training answers when it is done."""
    from ..training.evaluate.report import NAME

    page = trainer.output / NAME
    return {
        "result": path,
        "run": trainer.output,
        "step": trainer.step,
        "report": page if page.is_file() else None,
    }


def training_stop() -> Stop:
    """What a signal does to a training: it ends after the step, with a checkpoint."""
    return Stop(
        "stopped before the first step: what was cached is kept, the same command goes on",
        "stopping after this step, with a checkpoint",
    )


def stopped(args: argparse.Namespace, trainer: Any, path: Path, stop: Stop) -> Stopped:
    """How a run that was stopped ends: what there is, and the command that goes on."""
    number = stop.signal or signal.SIGTERM  # another process was told
    if not trainer.processes.main:
        return Stopped(number, "")
    command, checkpoint = going_on(args), path if path != trainer.output else None
    where = f"checkpoint {checkpoint}" if checkpoint else "no checkpoint yet"
    return Stopped(
        number,
        f"stopped at step {trainer.step} of {trainer.config.max_steps}, {where}; to go on: {command}",
        run=trainer.output,
        step=trainer.step,
        checkpoint=checkpoint,
        command=command,
    )


def going_on(args: argparse.Namespace) -> str:
    """The command that goes on with a run, whatever ended it."""
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        return "the same command with --resume auto"
    return shlex.join(["diptych", *_without_resume(args.words), "--resume", "auto"])


def _without_resume(words: list[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if not skip and word != "--resume" and not word.startswith("--resume="):
            kept.append(word)
        skip = word == "--resume"
    return kept


def _train_world(values: dict[str, Any]) -> dict[str, Any]:
    """The parts of the bundled tiny models have trainers of their own; they go on from their last state."""
    import importlib

    from ..training import recipes
    from ..training.runtime import disk, lock

    module_name, class_name = WORLD_TASKS[values.pop("task")]
    module = importlib.import_module(f"..training.{module_name}", __package__)
    values.pop("resume", None)
    recipe = recipes.from_dict(values, getattr(module, class_name))
    output = disk.check_folder(recipe.output_dir, "output_dir")
    stop = Stop("stopped: nothing was kept", "stopping after this step, with its state")
    with stop, lock.held(output), Steps(recipe.steps) as bar:
        path = module.train(recipe, bar.step, should_stop=stop.asked)
    if path.is_file():
        raise Stopped(stop.signal, f"stopped, {path} is kept; the same command goes on from it", run=output)
    sys.stdout.write(f"{path}\n")
    return {"result": path, "run": output, "step": recipe.steps, "report": None}


class Steps:
    """The bar of a training's steps, which begins where a resumed run does; loss and rate stand beside it."""

    def __init__(self, steps: int):
        self.steps: int = steps
        self.bar: Bar | None = None

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def report(self, report: Any) -> None:
        """A log line of the trainer."""
        self.show(report.step, loss=report.loss, lr=report.lr, rows_s=report.rows_per_second)

    def step(self, step: int, steps: int, loss: float) -> None:
        """A step of a trainer that reports its loss alone."""
        self.show(step, loss=loss)

    def advance(self, step: int) -> None:
        """One step done."""
        self.show(step)

    def show(self, step: int, **figures: float) -> None:
        """Move the bar to `step`, with these figures beside it."""
        if self.bar is None:
            self.bar = Bar("training", self.steps, done=step - 1)
        self.bar.to(step, **figures)
