"""glid-3-xl-stable in ComfyUI: its canvas as a conditioning, and its samplers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models import glid, pixels
from .conditioning import with_values
from .widgets import choice, integer, socket, switch

CATEGORY = "diptych/outpaint"
CELL = 8


class DiptychGlidConditioner:
    """`models/glid` and ComfyUI's VAE."""

    DISPLAY_NAME = "Glid Conditioner"
    DESCRIPTION = (
        "Conditions glid-3-xl-stable's inpainting model (inpaint.pt in Load Diffusion Model, kl.pt in Load "
        "VAE) on what is known of an image. It has no mask channel: unknown latent cells are exact zeros. "
        "Sample with Glid Sampler; for large canvases put Tiled Sampler around it."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT", "MASK")
    RETURN_NAMES = ("positive", "negative", "latent", "mask")
    OUTPUT_TOOLTIPS = (
        "The prompt with the known latents.",
        "The negative prompt with the known latents.",
        "The known latents, zeros elsewhere: sets the size of the result.",
        "What will be painted, in whole cells of 8 px, white: to Tiled Sampler.",
    )
    FUNCTION = "condition"
    SEARCH_ALIASES = ["glid-3-xl", "glid inpaint", "glid outpaint", "instruct pix2pix conditioning"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "model": socket("MODEL")("glid's inpaint.pt; one without its extra channels is refused."),
                "positive": socket("CONDITIONING")(
                    "The encoded prompt, by CLIP-L (clip type stable_diffusion)."
                ),
                "negative": socket("CONDITIONING")("The encoded negative prompt; empty is usual."),
                "vae": socket("VAE")("kl.pt, or any VAE of Stable Diffusion 1."),
                "image": socket("IMAGE")(
                    "An outpaint canvas, or an image with a hole. Rows and columns beyond a multiple of 8 "
                    "are left out, as glid does."
                ),
                "mask": socket("MASK")("What to paint; of the image's size."),
                "white_means": choice(["repaint", "keep"], "repaint")(
                    "repaint: as everywhere in ComfyUI. keep: as in glid's own mask files."
                ),
            }
        }

    def condition(
        self,
        model: Any,
        positive: list,
        negative: list,
        vae: Any,
        image: Tensor,
        mask: Tensor,
        white_means: str = "repaint",
    ) -> tuple[list, list, dict, Tensor]:
        """(positive, negative, latent, mask [B,H,W]) for image [B,H,W,C] and mask [B,H,W].

        Raises ValueError for another model, and a mask of another size, empty or full.
        """
        from ..models.glid.comfy import require_glid

        require_glid(model)
        image = pixels.rgb(pixels.as_image(image))
        mask = pixels.as_mask(mask)
        if mask.shape[1:] != image.shape[1:3]:
            raise ValueError(
                f"mask is {mask.shape[2]}x{mask.shape[1]} but the image is {image.shape[2]}x"
                f"{image.shape[1]}: connect the image's own."
            )
        height, width = (side // CELL * CELL for side in image.shape[1:3])
        batch = max(len(image), len(mask))
        image, mask = (pixels.repeat_batch(part, batch)[:, :height, :width] for part in (image, mask))
        latents, known = glid.known_latents(vae.encode, image, mask, white_means)
        embed = glid.image_embed(latents, known, model.model.latent_format.scale_factor)
        values = {"concat_latent_image": embed}
        told = (~known[:, 0]).float().repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
        return with_values(positive, values), with_values(negative, values), {"samples": latents}, told


class DiptychGlidSampler:
    """`samplers/plms.py` through `models/glid/comfy.py`."""

    DISPLAY_NAME = "Glid Sampler"
    DESCRIPTION = (
        "glid-3-xl-stable's own samplers, PLMS and DDIM, with its own timesteps and its own guidance. Give "
        "all three outputs to a guider and Sampler Custom Advanced; each goes with the others."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "SAMPLER", "SIGMAS")
    RETURN_NAMES = ("model", "sampler", "sigmas")
    OUTPUT_TOOLTIPS = (
        "To the CFG Guider: the model with glid's guidance and exact timesteps.",
        "To SamplerCustomAdvanced, or to Tiled Sampler.",
        "To SamplerCustomAdvanced: steps + 1 noise levels.",
    )
    FUNCTION = "build"
    SEARCH_ALIASES = ["plms", "pndm", "ddim", "glid-3-xl"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "model": socket("MODEL")("glid's inpaint.pt."),
                "method": choice(["plms", "ddim"], "plms")(
                    "plms: glid's default, 9 more model calls than steps. ddim: one call a step."
                ),
                "steps": integer(50, 1, 1000)(
                    "plms: 4 or more. ddim: even strides through 1000, such as 10, 50, 100 or 250."
                ),
                "glid_cfg": switch(True, advanced=True)(
                    "On: guidance leaves the fourth latent channel alone, as glid does. Off: all four."
                ),
            }
        }

    def build(self, model: Any, method: str, steps: int, glid_cfg: bool = True) -> tuple[Any, Any, Tensor]:
        """(MODEL, SAMPLER, SIGMAS [steps + 1]). Raises ValueError for a step count the method lacks."""
        from ..models.glid import comfy

        comfy.require_glid(model)
        with torch.inference_mode(False):
            return comfy.prepared(model, method, steps, glid_cfg)


NODES = [DiptychGlidConditioner, DiptychGlidSampler]
