"""FLUX.1 Fill on diffusers modules: a masked image joins the noisy latents channel by channel.

Also what ICEdit runs on, with a diptych from `diptych.py` as the image. Equal to FluxFillPipeline on the
same weights and noise (tests/parity). Not the loop: `samplers/flow_match.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .denoiser import Condition, TextEmbedding, hard_mask, model_pixels, same_batch
from .flux import FluxDenoiser
from .packing import pack_latents, pack_mask


class FluxFill(FluxDenoiser):
    """Denoiser with 384 input channels per token: 64 noisy, 64 of the masked image, 256 of the mask."""

    in_channels = 384
    name = "FLUX.1 Fill"

    @staticmethod
    def _pipeline_class() -> Any:
        from diffusers import FluxFillPipeline

        return FluxFillPipeline

    @torch.no_grad()
    def condition(
        self,
        text: TextEmbedding,
        image: Tensor,
        mask: Tensor,
        *,
        guidance: float | Tensor = 30.0,
        negative: TextEmbedding | None = None,
        cfg: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Condition:
        """Condition on the image outside the mask.

        image: IMAGE [B,H,W,C] in 0..1, sides multiples of 16. mask: MASK [B,H,W], 1 = repaint; cut at 0.5,
        and the masked pixels become gray 0.5 before encoding, as in FluxFillPipeline. Text, image and mask
        may each have batch 1. guidance: the embedded guidance, 30 to 50 (a number, or one per sample).
        negative, cfg: classifier-free guidance against a negative prompt. generator: sample the VAE posterior
        instead of its mode. Raises ValueError for sizes or batches that do not fit.
        """
        pixels = model_pixels(image)
        hard = hard_mask(mask, *pixels.shape[-2:]).to(pixels.device)
        inputs = same_batch(image=pixels, mask=hard)
        # Zero in -1..1 is the gray 0.5. One image for many prompts is encoded once.
        masked_tokens = pack_latents(self._encode(inputs["image"] * (1 - inputs["mask"]), generator))
        mask_tokens = pack_mask(inputs["mask"]).to(masked_tokens)
        joined = torch.cat([masked_tokens, mask_tokens], dim=-1)
        batch = max(len(text), joined.shape[0])
        return Condition(
            text=text.expand(batch),
            guidance=self.guidance_tensor(guidance, batch),
            features=same_batch(prompt=text.tokens, image=joined)["image"],
            negative=negative.expand(batch) if negative is not None else None,
            cfg=cfg,
        )
