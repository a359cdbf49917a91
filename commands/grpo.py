"""`diptych grpo RECIPE`: improve a model by reward; live reward; in the end a curve, before and after."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from .logs import speak
from .progress import over, quiet
from .recipe_options import add_recipe_arguments, overrides_of, recipe_help
from .train import Steps, finished, going_on, stopped, training_stop

logger = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> None:
    """Add `diptych grpo` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "grpo",
        add_help=False,
        help="train a LoRA by reward (GRPO or DiffusionNFT)",
        description="Improve a model by reward. Several GPUs: "
        "accelerate launch -m comfyui_diptych grpo RECIPE ...",
    )
    add_recipe_arguments(parser, options_of_reward_training, recipes_of_reward_training, _kind)
    parser.set_defaults(run=run)


def options_of_reward_training() -> str:
    """What `diptych grpo --help` adds: the recipes and every option."""
    from ..training.reinforce.config import GRPOConfig

    return recipe_help(recipes_of_reward_training(), GRPOConfig)


def recipes_of_reward_training() -> dict[str, str]:
    """The bundled recipes of reward training, each with its line."""
    from ..training import recipes

    return recipes.summaries("grpo_")


def _kind() -> type:
    """A configuration with every option that a recipe may have."""
    from ..training.reinforce.config import TinyGRPOConfig

    return TinyGRPOConfig


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train by reward. Raises `Stopped` after a signal, ValueError for a wrong recipe."""
    from ..training import recipes
    from ..training.reinforce.config import GRPOConfig

    speak()
    quiet()
    config = recipes.from_dict(recipes.read(args.recipe, overrides_of(args)), GRPOConfig)
    with training_stop() as stop:
        from ..training.reinforce.trainer import GRPOTrainer

        with Steps(config.max_steps) as bar:

            def show(report: Any) -> None:
                rewards = {
                    k.removeprefix("reward/"): v
                    for k, v in trainer.measures.items()
                    if k.startswith("reward/")
                }
                bar.show(report.step, **rewards, loss=report.loss)

            trainer = GRPOTrainer(
                config, on_report=show, progress=over, should_stop=stop.asked, command=going_on(args)
            )
            path = trainer.run()
        if path.suffix != ".safetensors":
            raise stopped(args, trainer, path, stop)
    drawn: list[Path] = []
    if trainer.processes.main:
        sys.stdout.write(f"{path}\n")
        drawn = _illustrate(trainer)
    return finished(trainer, path) | {"images": drawn}


def _illustrate(trainer: Any) -> list[Path]:
    """Draw what the run changed, and report it; the LoRA is on disk, so no failure here may look like the
    training's."""
    from ..training.choices import is_small
    from ..training.data.sample import to_pil
    from ..training.evaluate import history, plots, report
    from ..training.runtime import disk

    images = {
        "rewards.png": lambda: plots.curve(
            history.rewards(trainer.output).items(), title="reward of the rollouts"
        )
    }
    if not trainer.processes.sharded:
        images[report.BEFORE_AFTER] = lambda: to_pil(trainer.before_after(is_small(trainer.config.model))[0])
    drawn = []
    for name, draw in images.items():
        try:
            path = disk.keep_whole(trainer.output / name, draw().save)
            sys.stdout.write(f"{path}\n")
            drawn.append(path)
        except (OSError, ValueError, RuntimeError) as error:
            logger.warning("an image of the run could not be made (%s); the LoRA is complete", error)
    report.attempt(trainer.output)
    return drawn
