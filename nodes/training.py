"""The training node: a LoRA from a folder of images. What it trains on what is `training/choices.py`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

from . import widgets
from .guard import validated
from .menus import DEMO, TINY, base_models, data_spec, datasets, model_folder
from .shown import shown
from .widgets import Row, choice, integer, text

RECIPES = ["auto", "icedit", "icedit_moe", "kontext", "sd_inpaint_dreambooth"]


def dataset_menu(tooltip: str) -> Row:
    """The menu of what to train on; both training nodes have it."""
    return choice([DEMO, *datasets()], DEMO)(tooltip)


def base_model_menu(kind: str, recipes: list[str]) -> Row:
    """The menu of what to train; both training nodes have it.

    Its option `meant` tells the page what auto means: {base model: {recipe: words}}, for `web/js/auto.js`.
    kind: "Choices" or "RewardChoices".
    """
    models = {name: str(model_folder(name)) for name in (*TINY, *base_models())}
    meant = {name: {r: words for r in recipes if (words := _meant(kind, m, r))} for name, m in models.items()}
    return choice(models, next(iter(TINY)), meant=meant)(
        "A diffusers folder in ComfyUI's models/diffusers (FLUX.1-Fill-dev, FLUX.1-Kontext-dev, an SD "
        "inpainting model), or a bundled tiny one to try it out."
    )


@functools.lru_cache(maxsize=1024)
def _meant(kind: str, model: str, recipe: str) -> str:
    """What auto means for a recipe and a model's folder; "" where they do not go together."""
    from ..training import choices

    try:
        made = getattr(choices, kind)(data="", model=model, name="", recipe=recipe)
        return choices.automatic(
            dataclasses.replace(made, preset=recipe) if kind == "RewardChoices" else made
        )
    except ValueError:
        return ""


class DiptychTrainLora:
    """Supervised training: `training/session.py` inside ComfyUI."""

    DISPLAY_NAME = "Train Edit LoRA"
    DESCRIPTION = (
        "Trains a LoRA from a folder of images, right here: ICEdit on FLUX Fill (before/after pairs in a "
        "diptych), FLUX Kontext, or SD inpainting. Interrupting saves a checkpoint; the same settings go on "
        "from it. ComfyUI's own models are unloaded first; a diffusers copy of the base is trained."
    )
    CATEGORY = "diptych/training"
    RETURN_TYPES = ("STRING", "IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("lora_name", "loss_curve", "samples", "report")
    OUTPUT_TOOLTIPS = (
        "Name of the file in ComfyUI's loras folder, for the LoRA loaders.",
        "The loss over the steps, with its running mean.",
        "The last sample images: source, result and target. The curve if there are none.",
        "What was trained on what, and how the loss went.",
    )
    FUNCTION = "train"
    NEEDS = ("diffusers", "transformers", "peft", "accelerate", "yaml")
    OUTPUT_NODE = True
    SEARCH_ALIASES = [
        "lora training",
        "finetune",
        "icedit training",
        "kontext training",
        "dreambooth",
        "train",
    ]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "dataset": dataset_menu(
                    "A folder in ComfyUI's input folder with NAME_source.png, NAME_target.png and NAME.txt "
                    "(the instruction), or a .jsonl file with prompt, image and mask."
                ),
                "base_model": base_model_menu("Choices", RECIPES),
                "steps": integer(500, 1, 1_000_000)("Optimiser steps. More of them later go on from here."),
                "output_name": widgets.output_name("my_edit_lora"),
            },
            "optional": {
                "recipe": choice(RECIPES, "auto", advanced=True)(
                    "auto takes the one that fits the base model. icedit_moe: a mixture of experts."
                ),
                "rank": widgets.rank("the recipe's"),
                "learning_rate": widgets.learning_rate("1e-4 (1e-3 for the tiny models)"),
                "resolution": widgets.resolution("the recipe's"),
                "batch_size": widgets.of_recipe("Pairs per step; auto: the recipe's.", 256),
                "precision": widgets.precision(),
                "save_every": widgets.save_every(100, "Steps"),
                "preview_every": widgets.preview_every(100, "Steps"),
                "class_prompt": text("", advanced=True)(
                    "SD inpainting: what the subject is a kind of (a photo of a dog), to keep the model's "
                    "idea of it (prior preservation). Empty = off."
                ),
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
        folder = datasets().get(dataset) if isinstance(dataset, str) else None  # None: it comes by a link
        files = sorted(folder.rglob("*")) if folder else []
        stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def train(
        self,
        dataset: str,
        base_model: str,
        steps: int,
        output_name: str,
        recipe: str = "auto",
        rank: int = 0,
        learning_rate: float = 0.0,
        resolution: int = 0,
        batch_size: int = 0,
        precision: str = "auto",
        save_every: int = 100,
        preview_every: int = 100,
        class_prompt: str = "",
        training_seed: int = 0,
    ) -> dict:
        """(LoRA name, loss curve [1,H,W,3], samples [N,H,W,3], report), and the node's display.

        Raises ValueError, before anything is loaded, for choices that do not fit together.
        """
        from ..training.choices import Choices, task_of

        model = model_folder(base_model)
        choices = Choices(
            data=data_spec(dataset, task_of(model)),
            model=str(model),
            name=output_name.strip(),
            recipe=recipe,
            steps=steps,
            rank=rank,
            lr=learning_rate,
            resolution=resolution,
            batch_size=batch_size,
            seed=training_seed,
            precision=precision,
            save_every=save_every,
            preview_every=preview_every,
            class_prompt=class_prompt.strip(),
        )
        from ..training import comfy

        lora, outcome = comfy.run(choices)
        samples = outcome.curve if outcome.samples is None else outcome.samples
        report = f"{outcome.report}\nLoRA: {lora}"
        images = [outcome.curve] if outcome.samples is None else [outcome.curve, outcome.samples]
        return {"ui": shown(report, *images), "result": (lora.name, outcome.curve, samples, report)}


NODES = [DiptychTrainLora]
