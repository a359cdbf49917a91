"""glid on diffusers modules: a UNet of eight input channels, told of what is known by its latents."""

from __future__ import annotations

import torch
from torch import Tensor

from ..denoiser import Condition, TextEmbedding, model_pixels, same_batch, sized_mask
from ..packing import VAE_FACTOR
from ..pixels import as_image, rgb
from ..sd import StableDiffusion
from .geometry import guided, known_latents

IN_CHANNELS = 8
CFG = 7.0  # glid's default scale


class Glid(StableDiffusion):
    """epsilon(x, t | text, known latents) on latents [B,4,h,w], scaled by the VAE's factor (0.18215).

    `glid_cfg`: guide the first three channels only, as glid does.
    """

    in_channels = IN_CHANNELS
    name = "glid"
    who_takes, remedy = "glid's", "load its inpaint.pt (`diptych glid folder`)"
    glid_cfg = True

    @torch.no_grad()
    def known(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled latents [B,4,h,w] of what is known, 0 elsewhere, and bool [B,1,h,w]; mask 1 = repaint.

        Raises ValueError for sides that do not divide by 8, and a mask of another size, empty or full.
        """
        image = rgb(as_image(image))
        mask = sized_mask(mask, *image.shape[1:3])
        model_pixels(image[:1], VAE_FACTOR)  # its check of the sides
        inputs = same_batch(image=image, mask=mask)
        latents, known = known_latents(self.encode, inputs["image"], inputs["mask"])
        return latents, known.to(latents.device)

    @torch.no_grad()
    def condition(
        self,
        text: TextEmbedding,
        image: Tensor,
        mask: Tensor,
        *,
        negative: TextEmbedding | None = None,
        cfg: float = CFG,
    ) -> Condition:
        """Condition on image [B,H,W,3] outside mask [B,H,W] (1 = repaint); cfg needs `negative`.

        Text, image and mask may each have batch 1. Raises ValueError for what `known` refuses.
        """
        return self.told(text, self.known(image, mask)[0], negative=negative, cfg=cfg)

    def told(
        self, text: TextEmbedding, known: Tensor, *, negative: TextEmbedding | None = None, cfg: float = CFG
    ) -> Condition:
        """Condition on scaled latents [B,4,h,w] that are exactly 0 where nothing is known."""
        batch = max(len(text), len(known))
        return Condition(
            text=text.expand(batch),
            features=same_batch(prompt=text.tokens, image=known)["image"],
            negative=negative.expand(batch) if negative is not None else None,
            cfg=cfg,
        )

    def _guide(self, positive: Tensor, negative: Tensor, cfg: float) -> Tensor:
        return guided(positive, negative, cfg, self.glid_cfg)
