"""What FLUX Fill and FLUX Kontext share on diffusers modules: text, VAE, and one prediction of the velocity.

The two differ only in how an image joins the noisy latents (`Condition`): `flux_fill.py`, `flux_kontext.py`.
Inside ComfyUI its own MODEL runs instead; this host serves the command line, training and the tests.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import model_index
from .denoiser import Condition, TextEmbedding, as_sigma, decoded, model_pixels, posterior
from .flux_text import FluxText
from .packing import fill_features, image_ids, pack_latents, unpack_latents


def default_device() -> torch.device:
    """CUDA (or ROCm), Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword of diffusers' `from_pretrained` for a dtype: renamed in 0.40, the old one warns."""
    from diffusers import __version__

    version = tuple(int(part) for part in __version__.split(".")[:2])
    return {"dtype" if version >= (0, 40) else "torch_dtype": dtype}


def support_torch_2_4() -> None:
    """Let diffusers' FLUX run on torch 2.4: it passes `enable_gqa`, which torch's attention has since 2.5.

    Does nothing on newer torch.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 5):
        return
    from diffusers.models.transformers import transformer_flux

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
        )
        return out.transpose(1, 2)

    transformer_flux.dispatch_attention_fn = attention


def check_folder(folder: str | Path, part: str, in_channels: int, what: str) -> None:
    """Refuse a local folder that is not the wanted diffusers model, before any weight is read.

    `part` is the denoiser's subfolder ("transformer", "unet"). A string that is no local path is taken for a
    hub id and left to the loader. Raises ValueError or FileNotFoundError.
    """
    path = Path(folder)
    if not path.exists():
        is_hub_id = not path.is_absolute() and str(folder).count("/") == 1 and not str(folder).startswith(".")
        if not is_hub_id:
            raise FileNotFoundError(
                f"model folder {folder} does not exist: pass a diffusers folder or a hub id"
            )
        return
    config = path / part / "config.json"
    if not (path / "model_index.json").is_file() or not config.is_file():
        raise ValueError(
            f"model folder {folder} has no model_index.json or no {part}/config.json: "
            "download the whole diffusers folder"
        )
    found = read_config(config).get("in_channels")
    if found != in_channels:
        raise ValueError(
            f"model folder {folder} has {found} input channels where {what} has {in_channels}: "
            "give that model's folder"
        )
    model_index.check(read_config(path / "model_index.json"), str(folder), path)


def check_pipeline(folder: str | Path) -> None:
    """The same check of what a hub id's model_index.json names, which is fetched for it."""
    if not Path(folder).exists():
        from diffusers import DiffusionPipeline

        model_index.check(DiffusionPipeline.load_config(str(folder)), str(folder))


def read_config(path: Path) -> dict[str, Any]:
    """A model's JSON file. Raises ValueError that names it where it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model file {path} is damaged ({error}): download the model again") from None
    if not isinstance(values, dict):
        raise ValueError(f"model file {path} is no JSON object: download the model again")
    return values


class FluxDenoiser:
    """Velocity of a diffusers FluxTransformer2DModel on spatial latents [B,16,h,w].

    Give modules directly, or use `load`. A trainer may replace `transformer` by a wrapped one (peft, DDP,
    FSDP): only its call is used, not its attributes.
    """

    in_channels: int
    name: str

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        text: FluxText,
        *,
        device: torch.device | str | None = None,
        max_text_tokens: int | None = None,
    ):
        """Raises ValueError if the transformer's input width is not this model's."""
        if transformer.config.in_channels != self.in_channels:
            raise ValueError(
                f"the transformer takes {transformer.config.in_channels} channels per token where {self.name}"
                f" takes {self.in_channels}: load the weights of {self.name}"
            )
        support_torch_2_4()
        self.transformer = transformer
        self.vae = vae
        self.text = text
        self.device = torch.device(device) if device is not None else next(transformer.parameters()).device
        self.dtype: torch.dtype = transformer.dtype
        self.guidance_embeds: bool = transformer.config.guidance_embeds
        self.max_text_tokens = max_text_tokens or text.max_tokens

    @classmethod
    def from_pipeline(cls, pipeline: Any, **kwargs):
        """Share the modules of a diffusers FLUX pipeline."""
        text = FluxText(
            pipeline.tokenizer, pipeline.text_encoder, pipeline.tokenizer_2, pipeline.text_encoder_2
        )
        return cls(pipeline.transformer, pipeline.vae, text, **kwargs)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        *,
        offload: bool = False,
        **kwargs,
    ):
        """Load a diffusers folder or hub id, frozen and in eval mode.

        offload: keep each part on the CPU until it is used (accelerate's model offload), for small GPUs.
        Other arguments go to the constructor. Raises ValueError or FileNotFoundError for a wrong folder.
        """
        check_folder(folder, "transformer", cls.in_channels, cls.name)
        check_pipeline(folder)
        device = torch.device(device) if device is not None else default_device()
        pipeline = cls._pipeline_class().from_pretrained(str(folder), **dtype_argument(dtype))
        if offload and device.type != "cpu":
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            module.requires_grad_(False).eval()
        return cls.from_pipeline(pipeline, device=device, **kwargs)

    @staticmethod
    def _pipeline_class() -> Any:
        raise NotImplementedError

    def encode_text(self, prompts: str | Sequence[str]) -> TextEmbedding:
        """Prompts to a TextEmbedding on this model's device, in its dtype. See FluxText.encode."""
        return self.text.encode(prompts, self.max_text_tokens).to(self.device, self.dtype)

    @torch.no_grad()
    def encode(self, image: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """IMAGE [B,H,W,C] in 0..1, sides multiples of 16, to model-space latents [B,16,H/8,W/8] in float32.

        The mode of the VAE posterior, or with `generator` a sample of it (as FluxFillPipeline draws).
        """
        return self._encode(model_pixels(image), generator)

    def _encode(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """[B,3,H,W] in -1..1 to model-space latents, float32."""
        found = posterior(self.vae, pixels.to(self.device, self.vae.dtype))
        latents = found.mode() if generator is None else found.sample(generator)
        config = self.vae.config
        return ((latents - config.shift_factor) * config.scaling_factor).to(torch.float32)

    def decode(self, x0: Tensor) -> Tensor:
        """Model-space latents [B,16,h,w] to IMAGE [B,8h,8w,3] float32 in 0..1; differentiable."""
        config = self.vae.config
        latents = x0.to(self.device, self.vae.dtype) / config.scaling_factor + config.shift_factor
        pixels = decoded(self.vae, latents)
        return (pixels.to(torch.float32) / 2 + 0.5).clamp(0, 1).movedim(1, -1)

    def guidance_tensor(self, guidance: float | Tensor, batch: int) -> Tensor | None:
        """The embedded guidance as [B] float32, or None for a model distilled without it."""
        if not self.guidance_embeds:
            return None
        return torch.as_tensor(guidance, dtype=torch.float32, device=self.device).expand(batch)

    def velocity(self, x: Tensor, sigma: Tensor | float, condition: Condition) -> Tensor:
        """v at spatial latents x [B,16,h,w] and sigma (scalar or [B], 1 = noise); same shape and dtype as x.

        Differentiable in x and the weights. A condition of batch one serves every sample. With `negative` and
        cfg != 1 two forwards are made: v = v_neg + cfg (v_pos - v_neg).
        """
        condition = condition.expand(x.shape[0])
        velocity = self._forward(x, sigma, condition, condition.text)
        if condition.uses_cfg:
            unguided = self._forward(x, sigma, condition, condition.negative)
            velocity = unguided + condition.cfg * (velocity - unguided)
        return velocity

    def _forward(self, x: Tensor, sigma: Tensor | float, condition: Condition, text: TextEmbedding) -> Tensor:
        height, width = x.shape[-2:]
        noisy = pack_latents(x)
        tokens, ids = noisy, image_ids(height, width).to(x.device)
        if condition.features is not None:
            masked, mask = condition.features.tensor_split([noisy.shape[-1]], dim=-1)
            tokens = fill_features(noisy, masked, mask)
        if condition.references is not None:
            tokens = torch.cat([noisy, condition.references.to(noisy)], dim=1)
            ids = torch.cat([ids, condition.reference_ids.to(ids)], dim=0)
        places = text.ids if text.ids is not None else torch.zeros(text.tokens.shape[1], 3, device=x.device)
        velocity = self.transformer(
            hidden_states=tokens.to(self.dtype),
            timestep=as_sigma(sigma, x),
            guidance=condition.guidance,
            # contiguous: samples of one row may share their text's memory, and then other kernels would run
            pooled_projections=text.pooled.to(self.dtype).contiguous(),
            encoder_hidden_states=text.tokens.to(self.dtype).contiguous(),
            txt_ids=places,
            img_ids=ids,
            joint_attention_kwargs=self._attention(text, tokens.shape[1]),
            return_dict=False,
        )[0]
        return unpack_latents(velocity[:, : noisy.shape[1]], height, width).to(x.dtype)

    def _attention(self, text: TextEmbedding, image_tokens: int) -> dict[str, Tensor] | None:
        """The text's attention bias as the transformer takes it, [B, 1, 1, L + S]."""
        if text.bias is None:
            return None
        bias = torch.nn.functional.pad(text.bias, (0, image_tokens))
        return {"attention_mask": bias[:, None, None].to(self.dtype)}
