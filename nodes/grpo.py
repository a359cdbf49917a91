"""Train GRPO LoRA: improve an edit model by rewards, from the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from . import widgets
from .guard import validated
from .menus import NONE, TINY, data_spec, datasets, lora_names, lora_path, model_folder
from .shown import download, shown
from .training import DiptychTrainLora, base_model_menu, dataset_menu
from .widgets import choice, integer, socket, text

PRESETS = ["fast", "winner", "flow-grpo", "dance", "mixgrpo", "nft"]
AUTO = "auto"


class DiptychTrainGRPO:
    """Reward training: `training/session.py` inside ComfyUI."""

    DISPLAY_NAME = "Train GRPO LoRA"
    DESCRIPTION = (
        "Improves an edit model by rewards instead of examples: it samples, rewards score, and what was "
        "better than average becomes likelier (GRPO, or DiffusionNFT). Needs sources and instructions only. "
        "Interrupting saves a checkpoint; the same settings go on from it. ComfyUI's own models are unloaded "
        "first; a diffusers copy of the base is trained."
    )
    CATEGORY = "diptych/training"
    RETURN_TYPES = ("STRING", "IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("lora_name", "reward_curve", "before_after", "report")
    OUTPUT_TOOLTIPS = (
        "Name of the file in ComfyUI's loras folder, for the GRPO LoRA Loader.",
        "The mean reward of the samples over the updates.",
        "The same noise before and after training: source, before, after, target if it is known, and the "
        "reward of both.",
        "What was trained on what, and how the reward went.",
    )
    FUNCTION = "train"
    NEEDS = ("diffusers", "transformers", "peft", "accelerate", "yaml")
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["grpo training", "reinforcement learning", "dancegrpo", "flow grpo", "nft", "rlhf"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "reward": socket("DIPTYCH_REWARD")("What is good, from Edit Reward nodes."),
                "dataset": dataset_menu(
                    "A folder in ComfyUI's input folder with NAME.png and NAME.txt (the instruction), or "
                    "edit pairs as for Train Edit LoRA."
                ),
                "base_model": base_model_menu("RewardChoices", PRESETS),
                "updates": integer(40, 1, 1_000_000)(
                    "Rounds of sampling, scoring and learning. More later go on."
                ),
                "output_name": widgets.output_name("my_grpo_lora"),
            },
            "optional": {
                "images": socket("IMAGE")("Sources to learn on instead of the dataset."),
                "start_from": choice([AUTO, NONE, *lora_names()], AUTO)(
                    "A LoRA that makes the base an editor (ICEdit on FLUX Fill); it stays as it is and is "
                    "loaded beside the result. auto: the bundled one, for tiny models."
                ),
                "preset": choice(PRESETS, "fast")(
                    "fast: ours, DiffusionNFT with one noise per group; 6 steps. winner: fast, and a "
                    "contrastive update towards the group's best sample. flow-grpo, dance, mixgrpo, nft: as "
                    "published."
                ),
                "instructions": text("", multiline=True)(
                    "Only with images: one line for all, or one for each image."
                ),
                "group_size": widgets.of_recipe("Samples per instruction; auto: the preset's, 6 to 24.", 64),
                "groups": widgets.of_recipe("Instructions per update; auto: the preset's, 2 to 8.", 64),
                "rank": widgets.rank("the preset's"),
                "learning_rate": widgets.learning_rate("the preset's (5e-4 for the tiny models)"),
                "resolution": widgets.resolution("the preset's"),
                "precision": widgets.precision(),
                "save_every": widgets.save_every(10, "Updates"),
                "preview_every": widgets.preview_every(10, "Updates"),
                "training_seed": widgets.training_seed(),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, base_model: object = None) -> bool | str:
        """True, or what is not installed."""
        return validated(cls, base_model=base_model)

    @classmethod
    def IS_CHANGED(cls, dataset: object = None, **_: Any) -> str:
        """A text that changes when a file of the input changes, so that ComfyUI runs the node again."""
        return DiptychTrainLora.IS_CHANGED(dataset)

    def train(
        self,
        reward,
        dataset: str,
        base_model: str,
        updates: int,
        output_name: str,
        images: Tensor | None = None,
        start_from: str = AUTO,
        preset: str = "fast",
        instructions: str = "",
        group_size: int = 0,
        groups: int = 0,
        rank: int = 0,
        learning_rate: float = 0.0,
        resolution: int = 0,
        precision: str = "auto",
        save_every: int = 10,
        preview_every: int = 10,
        training_seed: int = 0,
    ) -> dict:
        """(LoRA name, reward curve [1,H,W,3], before and after [N,H,W,3], report), and the node's display.

        Raises ValueError, before anything is loaded, for choices that do not fit together.
        """
        from ..training import comfy
        from ..training.choices import RewardChoices, task_of

        model = model_folder(base_model)
        task = task_of(model)
        data = _data(dataset, task, images, instructions, comfy.root())
        recipe = reward.recipe()
        download(reward)
        choices = RewardChoices(
            data=data,
            model=str(model),
            name=output_name.strip(),
            recipe=preset,
            steps=updates,
            rank=rank,
            lr=learning_rate,
            resolution=resolution,
            seed=training_seed,
            precision=precision,
            save_every=save_every,
            preview_every=preview_every,
            preset=preset,
            rewards=tuple(recipe["rewards"]),
            reward_options=tuple(recipe["reward_options"]),
            start=_start(start_from, base_model, task),
            group_size=group_size,
            groups=groups,
        )
        lora, outcome = comfy.run(choices)
        report = f"{outcome.report}\nLoRA: {lora}"
        ui = shown(report, outcome.curve, outcome.samples)
        return {"ui": ui, "result": (lora.name, outcome.curve, outcome.samples, report)}


def _data(dataset: str, task: str, images: Tensor | None, instructions: str, root: Path) -> str:
    """The spec of the data: of the images, or of the dataset."""
    from ..training.data import specs

    if task == "sd_inpaint" and images is not None:
        raise ValueError("images are for edit models: leave them out for SD inpainting, or use a dataset.")
    if images is not None:
        return specs.save_sources(images, instructions, root)
    folder = datasets().get(dataset)
    if folder is not None and task != "sd_inpaint" and not specs.has_targets(folder):
        return specs.edit_sources(folder)
    return data_spec(dataset, task)


def _start(start_from: str, base_model: str, task: str) -> str:
    """The LoRA file merged into the base, or ""."""
    from ..models import tiny

    if start_from == NONE:
        return ""
    if start_from == AUTO:
        bundled = tiny.card().get("default_loras", {}).get(task, []) if base_model in TINY else []
        return str(tiny.folder() / "loras" / bundled[0]) if bundled else ""
    path = lora_path(start_from)
    if path is None:
        raise ValueError(f"start_from is {start_from!r}, which is not in the loras folder: put it there.")
    return str(path)


NODES = [DiptychTrainGRPO]
