"""Stable Diffusion 1.x / 2.x on diffusers modules, of any number of input channels; predicts epsilon.

What its inpainting models (`sd_inpaint.py`, nine channels) and its plain ones (`sd_blend.py`, four) share:
text, the VAE, one prediction. Pairs with `samplers/ddim.py`, not with the flow-match rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .denoiser import Condition, TextEmbedding, decoded, model_pixels, posterior
from .flux import check_folder, check_pipeline, default_device, dtype_argument
from .packing import VAE_FACTOR

if TYPE_CHECKING:
    from typing_extensions import Self


class StableDiffusion:
    """epsilon(x, t | text, features) on latents [B,4,h,w], scaled by the VAE's factor (0.18215)."""

    in_channels = 4
    name = "Stable Diffusion"
    who_takes, remedy = "a plain model", "use the engine for inpainting models"

    def __init__(
        self,
        unet: Any,
        vae: Any,
        tokenizer: Any,
        text_encoder: Any,
        *,
        scheduler_config: dict | None = None,
        device: torch.device | str | None = None,
    ):
        """scheduler_config: betas of the training schedule, for `samplers/ddim.py`.

        Raises ValueError for a UNet of another number of input channels.
        """
        if unet.config.in_channels != self.in_channels:
            raise ValueError(
                f"the UNet takes {unet.config.in_channels} channels but {self.who_takes} {self.in_channels}: "
                f"{self.remedy}"
            )
        self.unet = unet
        self.vae = vae
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.scheduler_config = dict(scheduler_config or {})
        self.device = torch.device(device) if device is not None else next(unet.parameters()).device
        self.dtype: torch.dtype = unet.dtype

    @classmethod
    def from_pipeline(cls, pipeline: Any, **kwargs):
        """Share the modules of a diffusers Stable Diffusion pipeline."""
        return cls(
            pipeline.unet,
            pipeline.vae,
            pipeline.tokenizer,
            pipeline.text_encoder,
            scheduler_config=pipeline.scheduler.config,
            **kwargs,
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load a diffusers folder or hub id, frozen, in eval mode. Raises ValueError or FileNotFoundError."""
        check_folder(folder, "unet", cls.in_channels, cls.name)
        check_pipeline(folder)
        from diffusers import StableDiffusionInpaintPipeline

        device = torch.device(device) if device is not None else default_device()
        pipeline = StableDiffusionInpaintPipeline.from_pretrained(
            str(folder), **dtype_argument(dtype), safety_checker=None, requires_safety_checker=False
        ).to(device)
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()
        return cls.from_pipeline(pipeline, device=device)

    @torch.no_grad()
    def encode_text(self, prompts: str | Sequence[str]) -> TextEmbedding:
        """CLIP's last hidden state, padded to the tokenizer's length: tokens [B, 77, D], no pooled vector."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return TextEmbedding(
            self.text_encoder(ids.to(self.text_encoder.device))[0].to(self.device, self.dtype)
        )

    @torch.no_grad()
    def encode(self, image: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """IMAGE [B,H,W,C] in 0..1, sides multiples of 8, to latents [B,4,H/8,W/8]: mode, or a sample."""
        return self._encode(model_pixels(image, VAE_FACTOR), generator)

    def _encode(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        found = posterior(self.vae, pixels.to(self.device, self.vae.dtype))
        latents = found.mode() if generator is None else found.sample(generator)
        return (latents * self.vae.config.scaling_factor).to(torch.float32)

    def decode(self, x0: Tensor) -> Tensor:
        """Latents [B,4,h,w] to IMAGE [B,8h,8w,3] float32 in 0..1; differentiable."""
        latents = x0.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        pixels = decoded(self.vae, latents)
        return (pixels.to(torch.float32) / 2 + 0.5).clamp(0, 1).movedim(1, -1)

    def epsilon(self, x: Tensor, timestep: Tensor | float, condition: Condition) -> Tensor:
        """The noise in latents x [B,4,h,w], in their shape and dtype; timestep 0..999, a scalar or [B].

        Differentiable. With `negative` and cfg != 1: e = e_neg + cfg (e_pos - e_neg), in one batch.
        """
        condition = condition.expand(x.shape[0])
        joined = x if condition.features is None else torch.cat([x, condition.features.to(x)], dim=1)
        joined = joined.to(self.dtype)
        timestep = torch.as_tensor(timestep, device=x.device).expand(x.shape[0])
        tokens = condition.text.tokens
        if condition.uses_cfg:
            tokens = torch.cat([condition.negative.tokens, tokens])
            joined, timestep = torch.cat([joined, joined]), torch.cat([timestep, timestep])
        predicted = self._predict(joined, timestep, tokens.to(self.dtype).contiguous(), condition)
        if condition.uses_cfg:
            unguided, guided = predicted.chunk(2)
            predicted = self._guide(guided, unguided, condition.cfg)
        return predicted.to(x.dtype)

    def _guide(self, positive: Tensor, negative: Tensor, cfg: float) -> Tensor:
        return negative + cfg * (positive - negative)

    def _predict(self, joined: Tensor, timestep: Tensor, tokens: Tensor, condition: Condition) -> Tensor:
        """One call of the UNet; with classifier-free guidance the batch holds every sample twice."""
        return self.unet(joined, timestep, encoder_hidden_states=tokens, return_dict=False)[0]
