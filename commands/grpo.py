"""`diptych grpo RECIPE`: improve a model by reward; live reward; in the end a curve, before and after."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from .train import TrainingBar, add_recipe_arguments, overrides_of


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "grpo",
        help="train a LoRA by reward (GRPO or DiffusionNFT)",
        description="Improve a model by reward. Presets: grpo_fast, grpo_winner, grpo_flow, grpo_dance, "
        "grpo_mixgrpo, grpo_nft; a recipe of your own starts with `extends: grpo_fast`. Several GPUs: "
        "accelerate launch -m comfyui_diptych grpo RECIPE ...",
    )
    add_recipe_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..training import config as configs
    from ..training.grpo_config import GRPOConfig

    if args.help_config:
        sys.stdout.write(configs.describe(GRPOConfig) + "\n")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = configs.from_dict(configs.read(args.recipe, overrides_of(args)), GRPOConfig)
    from ..training.before_after import before_after
    from ..training.data.sample import to_pil
    from ..training.grpo import GRPOTrainer, reward_curve

    with TrainingBar(config.max_steps) as bar:

        def show(report: Any) -> None:
            rewards = {
                k.removeprefix("reward/"): v for k, v in trainer.measures.items() if k.startswith("reward/")
            }
            bar.show(report.step, **rewards, loss=report.loss)

        trainer = GRPOTrainer(config, on_report=show, progress=bar.wrap)
        path = trainer.run()
    if trainer.main:
        made = [path, reward_curve(trainer.output)]
        if path.suffix == ".safetensors" and not trainer.sharded:
            made.append(trainer.output / "before_after.png")
            to_pil(before_after(trainer)[0]).save(made[-1])
        sys.stdout.write("".join(f"{file}\n" for file in made))
    return 0
