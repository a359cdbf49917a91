"""The training node: a LoRA from a folder of images. What it trains on what is `training/session.py`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from .shown import shown

DEMO = "shapes demo (512 pairs)"
DEMO_SPEC = "shapes:512?split=train&seed=0&size=64&task={task}"
TINY = {
    "tiny fill (bundled)": "fill",
    "tiny kontext (bundled)": "kontext",
    "tiny sd_inpaint (bundled)": "sd_inpaint",
}
RECIPES = ["auto", "icedit", "icedit_moe", "kontext", "sd_inpaint_dreambooth"]
PRECISION_INPUT = (
    ["auto", "bfloat16", "float8_e4m3fn", "float32"],
    {
        "default": "auto",
        "tooltip": "Of the frozen base. auto: fp8 below 40 GB of GPU memory, else bfloat16.",
        "advanced": True,
    },
)


def _number(default: float, low: float, high: float, tooltip: str, **more: Any) -> dict:
    return {"default": default, "min": low, "max": high, "tooltip": tooltip, **more}


SEED_INPUT = ("INT", _number(0, 0, 2**31 - 1, "Of noise, order and weights.", advanced=True))


def rank_input(default: str) -> tuple:
    """The LoRA's rank, 0 = `default`."""
    return ("INT", _number(0, 0, 512, f"LoRA rank; 0 = {default}.", advanced=True))


def learning_rate_input(default: str) -> tuple:
    """The learning rate, 0 = `default`."""
    options = {"step": 1e-6, "round": False, "advanced": True}
    return ("FLOAT", _number(0.0, 0.0, 1.0, f"Of AdamW; 0 = {default}.", **options))


def resolution_input(default: str) -> tuple:
    """The side of an image in pixels, 0 = `default`."""
    tooltip = f"Side of one image in pixels, a multiple of 16; 0 = {default}."
    return ("INT", _number(0, 0, 4096, tooltip, step=16, advanced=True))


def _folder_paths() -> Any:
    """ComfyUI's module, or None outside ComfyUI."""
    try:
        import folder_paths
    except ImportError:
        return None
    return folder_paths


def datasets() -> dict[str, Path]:
    """Subfolders of ComfyUI's input folder, by name."""
    paths = _folder_paths()
    top = Path(paths.get_input_directory()) if paths else None
    if top is None or not top.is_dir():
        return {}
    return {p.name: p for p in sorted(top.iterdir()) if p.is_dir() and not p.name.startswith(".")}


def base_models() -> dict[str, Path]:
    """Complete diffusers folders under ComfyUI's models/diffusers, by name."""
    paths = _folder_paths()
    found: dict[str, Path] = {}
    for parent in paths.get_folder_paths("diffusers") if paths else []:
        for index in sorted(Path(parent).glob("*/model_index.json")):
            found.setdefault(index.parent.name, index.parent)
    return found


def base_model_input() -> tuple[list[str], dict]:
    """The widget that chooses what to train; both training nodes have it."""
    return (
        [*TINY, *base_models()],
        {
            "default": next(iter(TINY)),
            "tooltip": "A diffusers folder in ComfyUI's models/diffusers (FLUX.1-Fill-dev, "
            "FLUX.1-Kontext-dev, an SD inpainting model), or a bundled tiny one to try it out.",
        },
    )


class DiptychTrainLora:
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
        "The last sample images: what was given, what was made, what was wanted. The curve if there "
        "are none.",
        "What was trained on what, and how the loss went.",
    )
    FUNCTION = "train"
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
        return {
            "required": {
                "dataset": (
                    [DEMO, *datasets()],
                    {
                        "default": DEMO,
                        "tooltip": "A folder in ComfyUI's input folder with NAME_source.png, "
                        "NAME_target.png and "
                        "NAME.txt (the instruction), or a .jsonl file with prompt, image and mask.",
                    },
                ),
                "base_model": base_model_input(),
                "steps": (
                    "INT",
                    _number(500, 1, 1_000_000, "Optimiser steps. More of them later go on from here."),
                ),
                "output_name": (
                    "STRING",
                    {
                        "default": "my_edit_lora",
                        "tooltip": "File name in the loras folder, without extension.",
                    },
                ),
            },
            "optional": {
                "recipe": (
                    RECIPES,
                    {
                        "default": "auto",
                        "tooltip": "auto takes the one that fits the base model. icedit_moe: a mixture "
                        "of experts.",
                        "advanced": True,
                    },
                ),
                "rank": rank_input("the recipe's"),
                "learning_rate": learning_rate_input("1e-4 (1e-3 for the tiny models)"),
                "resolution": resolution_input("the recipe's"),
                "batch_size": ("INT", _number(0, 0, 256, "Pairs per step; 0 = the recipe's.", advanced=True)),
                "precision": PRECISION_INPUT,
                "save_every": ("INT", _number(100, 1, 100_000, "Steps between checkpoints.", advanced=True)),
                "preview_every": (
                    "INT",
                    _number(100, 0, 100_000, "Steps between sample images; 0 = none.", advanced=True),
                ),
                "class_prompt": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "SD inpainting: what the subject is a kind of (a photo of a dog), to "
                        "keep the "
                        "model's idea of it (prior preservation). Empty = off.",
                        "advanced": True,
                    },
                ),
                "training_seed": SEED_INPUT,
            },
        }

    @classmethod
    def IS_CHANGED(cls, dataset: object = None, **_: Any) -> str:
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
        from ..training import session

        model = model_folder(base_model)
        choices = session.Choices(
            data=data_spec(dataset, session.task_of(model)),
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


def data_spec(dataset: str, task: str) -> str:
    """The data source of an entry of the dataset menu. Raises ValueError when it is not there any more."""
    from ..training.data.sources import spec_of

    if dataset == DEMO:
        return DEMO_SPEC.format(task="inpaint" if task == "sd_inpaint" else "edit")
    folder = datasets().get(dataset)
    if folder is None:
        raise ValueError(
            f"dataset is {dataset!r}, which is not in ComfyUI's input folder: put a folder of pairs there"
        )
    return spec_of(folder, inside=True)


def model_folder(base_model: str) -> Path:
    """The diffusers folder of an entry of the model menu. Raises ValueError when it is not there any more."""
    from ..models import tiny

    folder = tiny.folder() / TINY[base_model] if base_model in TINY else base_models().get(base_model)
    if folder is None or not folder.is_dir():
        raise ValueError(
            f"base_model is {base_model!r}, which is not there: put a diffusers folder into ComfyUI's "
            f"models/diffusers"
        )
    return folder


NODES = [DiptychTrainLora]
