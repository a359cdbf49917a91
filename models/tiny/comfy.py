"""A tiny diffusers folder as ComfyUI's own objects: ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE.

ComfyUI's loaders recognise models by their full-size shapes, so a small one is put together by hand; from
there on everything (LoRA patches, offloading, previews, samplers) is ComfyUI's. Sizes come from config files.
Imported only at run time, from a node. Not for full-size checkpoints: those go through ComfyUI's own loaders.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import comfy.ldm.flux.model
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from torch import Tensor, nn

from .comfy_text import load_clip

PATCH = 2  # ComfyUI counts channels per latent pixel and packs 2x2 inside the model; diffusers packs outside
GLID_CHANNELS = 8
_DTYPE = torch.float32  # a few MB: never worth the rounding, and both hosts agree


def load(folder: Path) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a diffusers folder (FLUX Fill, FLUX Kontext, SD inpainting, glid), all float32.

    Raises ValueError if the folder is not a complete diffusers pipeline of one of these.
    """
    folder = Path(folder)
    # Nodes run in inference mode; parameters made there could never be cloned, patched or trained afterwards.
    with torch.inference_mode(False), torch.no_grad():
        vae = load_vae(folder)
        model = load_unet(folder, vae) if (folder / "unet").is_dir() else load_flux(folder, vae)
        clip = load_clip(folder)
    return model, clip, vae


def load_flux(folder: Path, vae: Any | None = None):
    """The transformer as a ModelPatcher; its latent format uses the scale and shift of the folder's own VAE.

    With a `vae` from `load_vae` the format also gets colours for step previews. Raises ValueError for a
    folder of another model.
    """
    config = _read_config(folder, "transformer")
    if "num_single_layers" not in config:
        raise ValueError(
            f"{folder} holds a {config.get('_class_name')}, not a FLUX transformer: pass a FLUX folder"
        )
    sizes = flux_sizes(config)
    family = comfy.supported_models.FluxInpaint if sizes["in_channels"] > 32 else comfy.supported_models.Flux
    model = _new_model(family(sizes), folder, vae)
    weights = comfy.model_detection.convert_diffusers_mmdit(_read_weights(folder / "transformer"), "")
    # strict: ComfyUI's layers skip initialisation, so a parameter left out would be whatever memory held
    model.diffusion_model.load_state_dict(weights, strict=True)
    return _patcher(model)


class DiffusersUNet(nn.Module):
    """A diffusers UNet2DConditionModel behind the call that ComfyUI's BaseModel makes.

    ComfyUI's own UNet fixes 32 normalisation groups, which a narrow one cannot have.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        # Its parts are the children, not the UNet: so ComfyUI's LoRA loader finds them by diffusers' names.
        object.__setattr__(self, "_unet", unet)
        for name, part in unet.named_children():
            self.add_module(name, part)
        self.dtype = _DTYPE

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        control: dict | None = None,
        **_: Any,
    ) -> Tensor:
        """Latents (of an inpainting model with what tells of the hole) [B,C,h,w] at timesteps 0..999 to
        epsilon [B,4,h,w].

        control: what a ControlNet adds, `output` to the connections and `middle` behind the middle block.
        """
        added = {}
        if control is not None:
            added["down_block_additional_residuals"] = control["output"]
            added["mid_block_additional_residual"] = control["middle"][0]
        return self._unet(x, timesteps, encoder_hidden_states=context, **added).sample


def load_unet(folder: Path, vae: Any | None = None):
    """An SD UNet as a ModelPatcher: ComfyUI samples epsilon, and of nine channels joins the last five.

    Of eight, glid's, it joins the last four, the known latents.
    """
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(str(folder / "unet"), torch_dtype=_DTYPE)
    sizes = {"in_channels": unet.config.in_channels, "disable_unet_model_creation": True}
    glid = unet.config.in_channels == GLID_CHANNELS
    family = comfy.supported_models.SD15_instructpix2pix if glid else comfy.supported_models.SD15
    model = _new_model(family(sizes), folder, vae)
    model.diffusion_model = DiffusersUNet(unet.eval())
    return _patcher(model)


def _new_model(model_config: Any, folder: Path, vae: Any | None):
    model_config.set_inference_dtype(_DTYPE, None)
    _set_latent_format(model_config.latent_format, _read_config(folder, "vae"), vae)
    return model_config.get_model({}, "", device=comfy.model_management.unet_offload_device())


def _patcher(model: nn.Module):
    model.requires_grad_(False)
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(model.to(offload), load_device=device, offload_device=offload)


def flux_sizes(config: dict) -> dict:
    """ComfyUI's FLUX settings for a diffusers FluxTransformer2DModel config."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    sizes = {
        "image_model": "flux",
        "in_channels": config["in_channels"] // PATCH**2,
        "out_channels": (config.get("out_channels") or config["in_channels"]) // PATCH**2,
        "patch_size": PATCH,
        "vec_in_dim": config["pooled_projection_dim"],
        "context_in_dim": config["joint_attention_dim"],
        "hidden_size": heads * head_dim,
        "mlp_ratio": 4.0,
        "num_heads": heads,
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]),
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": config["guidance_embeds"],
    }
    known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
    if "txt_ids_dims" in known:  # newer ComfyUI asks for it; FLUX.1 gives text no positions
        sizes["txt_ids_dims"] = []
    return sizes


class DiffusersVAE(nn.Module):
    """A diffusers AutoencoderKL behind the two calls comfy.sd.VAE makes; unscaled latents, posterior mode.

    ComfyUI's own AutoencoderKL fixes 32 normalisation groups, which a narrow VAE cannot have.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def encode(self, pixels: Tensor, **_: Any) -> Tensor:
        """Pixels [B,3,H,W] in -1..1 to latents [B,C,H/8,W/8]."""
        return self.vae.encode(pixels).latent_dist.mode()

    def decode(self, latents: Tensor, **_: Any) -> Tensor:
        """Latents [B,C,h,w] to pixels [B,3,8h,8w] in about -1..1."""
        return self.vae.decode(latents).sample


def load_vae(folder: Path):
    """The folder's AutoencoderKL inside a comfy.sd.VAE."""
    from diffusers import AutoencoderKL

    module = DiffusersVAE(AutoencoderKL.from_pretrained(str(folder / "vae"), torch_dtype=_DTYPE))
    module.eval().requires_grad_(False)
    channels = module.vae.config.latent_channels
    ratio = 2 ** (len(module.vae.config.block_out_channels) - 1)
    # The branch for pixel-space models builds no network; what it sets for itself is set right below.
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=_DTYPE)
    vae.first_stage_model = module
    vae.latent_channels, vae.latent_dim, vae.output_channels = channels, 2, 3
    vae.downscale_ratio = vae.upscale_ratio = ratio
    # A few activations of the widest layer at full size; the shapes are pixels (encode) and latents (decode).
    widest = 8 * max(module.vae.config.block_out_channels)
    vae.memory_used_encode = lambda shape, dtype: widest * shape[2] * shape[3] * dtype.itemsize
    vae.memory_used_decode = lambda shape, dtype: widest * shape[2] * shape[3] * ratio**2 * dtype.itemsize
    vae.patcher = comfy.model_patcher.ModelPatcher(
        module, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.size = None  # cached size of the placeholder (newer ComfyUI)
    return vae


def _set_latent_format(latent_format: Any, config: dict, vae: Any | None) -> None:
    latent_format.scale_factor = config["scaling_factor"]
    if hasattr(latent_format, "shift_factor"):
        latent_format.shift_factor = config.get("shift_factor") or 0.0
    latent_format.taesd_decoder_name = None  # made for FLUX's latents, noise on these
    latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias = None, None
    if vae is not None:
        factors = preview_factors(vae.first_stage_model, latent_format, vae.downscale_ratio)
        latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias = factors


def preview_factors(module: DiffusersVAE, latent_format: Any, ratio: int) -> tuple[list, list]:
    """Linear map from model-space latents to RGB in -1..1, fitted on random colour mosaics by least squares.

    Returns (factors [C][3], bias [3]): what ComfyUI draws step previews with.
    """
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(8, 3, 4, 4, generator=generator) * 2 - 1
    mosaics = colours.repeat_interleave(2 * ratio, dim=2).repeat_interleave(2 * ratio, dim=3)
    latents = latent_format.process_in(module.encode(mosaics))
    target = nn.functional.avg_pool2d(mosaics, ratio)
    rows = latents.movedim(1, -1).flatten(0, 2)
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    solution = torch.linalg.lstsq(rows, target.movedim(1, -1).flatten(0, 2), driver="gelsd").solution
    return solution[:-1].tolist(), solution[-1].tolist()


def _read_config(folder: Path, part: str) -> dict:
    path = folder / part / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no {part}/config.json: pass a complete diffusers pipeline folder")
    return json.loads(path.read_text(encoding="utf-8"))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file: pass a complete diffusers pipeline folder")
    return {name: weight.to(_DTYPE) for file in files for name, weight in load_file(file).items()}
