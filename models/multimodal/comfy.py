"""The multimodal model inside ComfyUI: its memory management, its progress bar, its stop button.

Imported only at run time, from a node. What is made is what the same call of `model.py` makes outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management as memory
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ..image_files import to_pil
from .model import BATCH, GenerativeMultimodalModel

BYTES = 512  # of activations for a pixel of an image, of a model in float32
PREVIEWED = 4  # images side by side


class _Held(nn.Module):
    """The model as a ModelPatcher may hold it: it sets `device`, which the model itself only tells."""

    def __init__(self, multimodal: GenerativeMultimodalModel):
        super().__init__()
        self.multimodal = multimodal


@dataclass(frozen=True)
class Loaded:
    """A model in ComfyUI's care, and the folder that it came from."""

    patcher: Any
    folder: Path

    @property
    def model(self) -> GenerativeMultimodalModel:
        """The model, wherever it is: for its words and sizes."""
        return self.patcher.model.multimodal

    def ready(self, images: int) -> GenerativeMultimodalModel:
        """The model on its device, with room for so many images."""
        pixels = min(images, BATCH) * self.model.architecture.image_size**2
        memory.load_models_gpu([self.patcher], memory_required=pixels * BYTES, force_full_load=True)
        # --novram leaves part of it behind, but these layers do not fetch their weights
        return self.model.to(self.patcher.load_device)


def load(folder: Path) -> Loaded:
    """What `save_pretrained` wrote, in float32. Raises ValueError or FileNotFoundError for another folder."""
    # Nodes run in inference mode; parameters made there could never be moved for good.
    with torch.inference_mode(False), torch.no_grad():
        model = GenerativeMultimodalModel.from_pretrained(folder).requires_grad_(False)
    device, offload = memory.get_torch_device(), memory.unet_offload_device()
    patcher = comfy.model_patcher.ModelPatcher(_Held(model), load_device=device, offload_device=offload)
    return Loaded(patcher, folder)


def text_to_image(
    loaded: Loaded,
    prompts: Sequence[str],
    count: int,
    *,
    steps: int,
    cfg: float,
    seed: int,
    diffusion: bool = True,
) -> Tensor:
    """IMAGE [prompts * count, S, S, 3]: `generate_from_text`, with a bar of its steps and previews."""
    images = len(prompts) * count
    model = loaded.ready(images)
    callback = _watch(model, steps * -(-images // BATCH)) if diffusion else None
    made = model.generate_from_text(prompts, count, diffusion, steps, seed, cfg=cfg, callback=callback)
    return made.to(memory.intermediate_device())


def _watch(model: GenerativeMultimodalModel, total: int) -> Callable[[int, Tensor], None]:
    """What is called after each step of so many: moves the bar, shows the images, obeys the stop button."""
    bar, done = comfy.utils.ProgressBar(total), 0
    shows = comfy.cli_args.args.preview_method != comfy.cli_args.LatentPreviewMethod.NoPreviews

    def step(_: int, latents: Tensor) -> None:
        nonlocal done
        done += 1
        preview = None
        if shows:
            beside = torch.cat([*model.decode(latents[:PREVIEWED]).cpu()], dim=1)
            preview = ("JPEG", to_pil(beside), 512)
        bar.update_absolute(done, total, preview)
        memory.throw_exception_if_processing_interrupted()

    return step


def image_to_text(loaded: Loaded, images: Tensor, count: int, seed: int, **sampling: Any) -> list[list[str]]:
    """`count` captions of each image: `generate_from_image`, with a bar of the images."""
    model, bar = loaded.ready(len(images)), comfy.utils.ProgressBar(len(images))

    def read(done: int) -> None:
        bar.update_absolute(done)
        memory.throw_exception_if_processing_interrupted()

    return model.generate_from_image(images, count, seed=seed, callback=read, **sampling)


def similarity(loaded: Loaded, images: Tensor, texts: Sequence[str]) -> Tensor:
    """Cosines [images, texts], float32 on the CPU."""
    return loaded.ready(len(images)).similarity(images, texts).cpu()
