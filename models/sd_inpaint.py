"""Stable Diffusion 1.5 / 2 inpainting (nine input channels) on diffusers modules; predicts epsilon.

Equal to StableDiffusionInpaintPipeline on the same weights and noise (tests/parity). Not for the four-channel
base models, which know nothing of a mask: those are `sd_blend.py`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .denoiser import Condition, TextEmbedding, model_pixels, same_batch, sized_mask
from .inpaint_masks import MASK_RESIZE, USUAL, MaskRule, latent_mask, tell
from .packing import VAE_FACTOR
from .pixels import as_image, rgb
from .sd import StableDiffusion

__all__ = ["IN_CHANNELS", "MASK_RESIZE", "MaskRule", "SDInpaint", "latent_mask"]

IN_CHANNELS = 9


class SDInpaint(StableDiffusion):
    """epsilon(x, t | text, masked image) on latents [B,4,h,w], scaled by the VAE's factor (0.18215)."""

    in_channels = IN_CHANNELS
    name = "SD inpainting"
    who_takes, remedy = "an inpainting model", "load an inpainting checkpoint"

    @torch.no_grad()
    def condition(
        self,
        text: TextEmbedding,
        image: Tensor,
        mask: Tensor,
        *,
        negative: TextEmbedding | None = None,
        cfg: float = 7.5,
        rule: MaskRule = USUAL,
        generator: torch.Generator | None = None,
    ) -> Condition:
        """Condition on image [B,H,W,3] outside mask [B,H,W] (1 = repaint), told of it by `rule`.

        cfg needs `negative` (encode "" for none). Text, image and mask may each have batch 1. Raises
        ValueError for sizes or batches that do not fit.
        """
        image = rgb(as_image(image))
        mask = sized_mask(mask, *image.shape[1:3]).to(image.device)
        inputs = same_batch(image=image, mask=mask)
        told = tell(inputs["image"], inputs["mask"], rule)
        masked = self._encode(model_pixels(told.masked, VAE_FACTOR), generator)
        features = torch.cat([told.cells.to(masked), masked], dim=1)
        batch = max(len(text), features.shape[0])
        return Condition(
            text=text.expand(batch),
            features=same_batch(prompt=text.tokens, image=features)["image"],
            negative=negative.expand(batch) if negative is not None else None,
            cfg=cfg,
        )
