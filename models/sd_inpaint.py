"""Stable Diffusion 1.5 / 2 inpainting (nine input channels) on diffusers modules; predicts epsilon.

Pairs with `samplers/ddim.py`, not with the flow-match rules. Equal to StableDiffusionInpaintPipeline on the
same weights and noise (tests/parity). Not for the four-channel base models, which know nothing of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .denoiser import Condition, TextEmbedding, decoded, hard_mask, model_pixels, posterior, same_batch
from .flux import check_folder, check_pipeline, default_device, dtype_argument
from .geometry import check_choice
from .packing import VAE_FACTOR

IN_CHANNELS = 9
MASK_RESIZE = ("max", "nearest")


def latent_mask(mask: Tensor, how: str = "max") -> Tensor:
    """Hard mask [B,1,H,W] to latent cells [B,1,H/8,W/8].

    max: a cell is repainted if any of its pixels is, so that no half-blank cell counts as known (leaves no
    seam). nearest: the cell's first pixel decides, as in StableDiffusionInpaintPipeline.
    """
    check_choice("mask_resize", how, MASK_RESIZE)
    return functional.max_pool2d(mask, VAE_FACTOR) if how == "max" else mask[..., ::VAE_FACTOR, ::VAE_FACTOR]


class SDInpaint:
    """epsilon(x, t | text, masked image) on latents [B,4,h,w], scaled by the VAE's factor (0.18215)."""

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
        """scheduler_config: betas of the training schedule, for `samplers/ddim.py`. Raises ValueError for a
        UNet that is not a nine-channel one."""
        if unet.config.in_channels != IN_CHANNELS:
            raise ValueError(
                f"the UNet takes {unet.config.in_channels} channels but an inpainting model {IN_CHANNELS}: "
                "load an inpainting checkpoint"
            )
        self.unet = unet
        self.vae = vae
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.scheduler_config = dict(scheduler_config or {})
        self.device = torch.device(device) if device is not None else next(unet.parameters()).device
        self.dtype: torch.dtype = unet.dtype

    @classmethod
    def from_pipeline(cls, pipeline: Any, **kwargs) -> SDInpaint:
        """Share the modules of a diffusers StableDiffusionInpaintPipeline."""
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
    ) -> SDInpaint:
        """Load a diffusers folder or hub id, frozen, in eval mode. Raises ValueError or FileNotFoundError."""
        check_folder(folder, "unet", IN_CHANNELS, "SD inpainting")
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

    @torch.no_grad()
    def condition(
        self,
        text: TextEmbedding,
        image: Tensor,
        mask: Tensor,
        *,
        negative: TextEmbedding | None = None,
        cfg: float = 7.5,
        mask_resize: str = "max",
        generator: torch.Generator | None = None,
    ) -> Condition:
        """Condition on image [B,H,W,3] outside mask [B,H,W] (1 = repaint, cut at 0.5, gray beneath).

        cfg needs `negative` (encode "" for none). mask_resize: see `latent_mask`. Text, image and mask may
        each have batch 1. Raises ValueError for sizes or batches that do not fit.
        """
        pixels = model_pixels(image, VAE_FACTOR)
        hard = hard_mask(mask, *pixels.shape[-2:]).to(pixels.device)
        inputs = same_batch(image=pixels, mask=hard)
        cells = latent_mask(inputs["mask"], mask_resize)
        masked = self._encode(inputs["image"] * (1 - inputs["mask"]), generator)
        features = torch.cat([cells.to(masked), masked], dim=1)
        batch = max(len(text), features.shape[0])
        return Condition(
            text=text.expand(batch),
            features=same_batch(prompt=text.tokens, image=features)["image"],
            negative=negative.expand(batch) if negative is not None else None,
            cfg=cfg,
        )

    def epsilon(self, x: Tensor, timestep: Tensor | float, condition: Condition) -> Tensor:
        """The noise in latents x [B,4,h,w], in their shape and dtype; timestep 0..999, a scalar or [B]."""
        condition = condition.expand(x.shape[0])
        joined = torch.cat([x, condition.features.to(x)], dim=1).to(self.dtype)
        timestep = torch.as_tensor(timestep, device=x.device).expand(x.shape[0])
        tokens = condition.text.tokens
        if condition.uses_cfg:
            tokens = torch.cat([condition.negative.tokens, tokens])
            joined, timestep = torch.cat([joined, joined]), torch.cat([timestep, timestep])
        predicted = self.unet(
            joined, timestep, encoder_hidden_states=tokens.to(self.dtype).contiguous(), return_dict=False
        )[0]
        if condition.uses_cfg:
            unguided, guided = predicted.chunk(2)
            predicted = unguided + condition.cfg * (guided - unguided)
        return predicted.to(x.dtype)
