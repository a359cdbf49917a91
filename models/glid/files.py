"""glid's `.pt` files as a diffusers folder: the same weights under diffusers' names.

ComfyUI reads the files themselves; the shell runs on diffusers. Text encoder, tokenizer and scheduler are
those of any Stable Diffusion 1.x folder: glid kept CLIP-L as it was.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checkpoints
from .model import IN_CHANNELS

COPIED = ("text_encoder", "tokenizer", "scheduler")
ENTRY = "input_blocks.0.0.weight"

State = dict[str, Tensor]


def unet_of(state: State, config: dict[str, Any]) -> Any:
    """A UNet2DConditionModel with the weights of `inpaint.pt` (LDM's names), by its diffusers config.

    Raises ValueError unless the file is an eight-channel denoiser of that architecture.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    channels = state[ENTRY].shape[1] if ENTRY in state else 0
    if channels != IN_CHANNELS:
        raise ValueError(
            f"the denoiser's file has {channels or 'no'} input channels where glid's has {IN_CHANNELS}: give "
            "inpaint.pt"
        )
    config = {**config, "in_channels": IN_CHANNELS}
    prefixed = {f"{checkpoints.DENOISER}{name}": value for name, value in state.items()}
    return _filled(UNet2DConditionModel, config, convert_ldm_unet_checkpoint(prefixed, config), "inpaint.pt")


def vae_of(state: State, config: dict[str, Any]) -> Any:
    """An AutoencoderKL with the weights of `kl.pt`. Raises ValueError for one of another architecture."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    prefixed = {f"{checkpoints.AUTOENCODER}{name}": value for name, value in state.items()}
    return _filled(AutoencoderKL, config, convert_ldm_vae_checkpoint(prefixed, config), "kl.pt")


def _filled(kind: Any, config: dict[str, Any], state: State, file: str) -> Any:
    module = kind.from_config(config)
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[1].strip()
        raise ValueError(f"{file} does not fit the Stable Diffusion folder ({reason}): use SD 1.x") from error
    return module


def write_folder(denoiser: Path, autoencoder: Path, base: Path, out: Path) -> Path:
    """A diffusers folder that `Glid.load` takes, from inpaint.pt, kl.pt and a Stable Diffusion 1.x folder.

    Raises ValueError or FileNotFoundError for files that are not these.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    for part in ("unet", "vae", *COPIED):
        if not (base / part).is_dir():
            raise FileNotFoundError(f"{base} has no {part}: give a Stable Diffusion 1.x diffusers folder")
    unet = unet_of(checkpoints.read(denoiser), UNet2DConditionModel.load_config(base / "unet"))
    vae = vae_of(checkpoints.read(autoencoder), AutoencoderKL.load_config(base / "vae"))
    for part in COPIED:
        shutil.copytree(base / part, out / part, dirs_exist_ok=True)
    unet.save_pretrained(out / "unet")
    vae.save_pretrained(out / "vae")
    shutil.copy(base / "model_index.json", out / "model_index.json")
    return out
