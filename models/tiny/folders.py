"""Writes the standard diffusers folders that the tiny models ship in: fill, kontext, sd_inpaint.

`glid/` is sd_inpaint's folder with the UNet that its own training wrote (`training/tasks/export.py`).

Files hold float16, config files say float32: every loader then computes in float32 unless told otherwise.
Each folder is complete on its own (a VAE and the text encoders are a few hundred kilobytes), so that the
stock pipelines load it as they load the real thing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

FLUX_SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SD_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}


def halve(folder: Path) -> None:
    """Rewrites every float32 safetensors file below `folder` in float16."""
    import torch
    from safetensors.torch import load_file, save_file

    for path in folder.rglob("*.safetensors"):
        state = {k: v.half() if v.dtype == torch.float32 else v for k, v in load_file(path).items()}
        save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})


def forget_origin(folder: Path) -> None:
    """Takes the path that a part was loaded from out of its `config.json`, where diffusers leaves it."""
    for path in folder.rglob("config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_text(text: Path, out: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        shutil.copytree(text / part, out / part, dirs_exist_ok=True)


def _index(out: Path, pipeline: str, parts: dict[str, tuple[str, str]], **extra: Any) -> None:
    content = {"_class_name": pipeline, "_diffusers_version": "0.32.0", **parts, **extra}
    (out / "model_index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_flux(out: Path, *, vae: Path, text: Path, transformer: Any, kontext: bool = False) -> Path:
    """A FluxFillPipeline (or FluxKontextPipeline) folder from VAE and text folders and a transformer."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(vae, out / "vae", dirs_exist_ok=True)
    _copy_text(text, out, ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"))
    transformer.float().save_pretrained(out / "transformer")
    FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER).save_pretrained(out / "scheduler")
    parts = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "T5TokenizerFast"),
        "transformer": ("diffusers", "FluxTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    _index(out, "FluxKontextPipeline" if kontext else "FluxFillPipeline", parts)
    halve(out)
    forget_origin(out)
    return out


def write_sd(out: Path, *, vae: Any, text: Path, unet: Any) -> Path:
    """A StableDiffusionInpaintPipeline folder, without safety checker, from modules and a text folder."""
    from diffusers import DDIMScheduler

    out.mkdir(parents=True, exist_ok=True)
    vae.float().save_pretrained(out / "vae")
    unet.float().save_pretrained(out / "unet")
    _copy_text(text, out, ("tokenizer", "text_encoder"))
    DDIMScheduler(**SD_SCHEDULER).save_pretrained(out / "scheduler")
    parts = {
        "feature_extractor": (None, None),
        "image_encoder": (None, None),
        "safety_checker": (None, None),
        "scheduler": ("diffusers", "DDIMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    _index(out, "StableDiffusionInpaintPipeline", parts, requires_safety_checker=False)
    halve(out)
    forget_origin(out)
    return out
