"""ControlNet Inpaint: models without a channel for a mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..models import control_inpaint
from . import widgets
from .menus import NONE, lama_files, lama_path
from .sd_inpaint import CATEGORY
from .widgets import choice, number, socket

MODES = ("inpaint_only", "global_harmonious")
PREFILLS = (NONE, "lama", "blur", "edge", "mirror", "mean", "neutral", "telea", "ns")


class DiptychControlNetInpaint:
    """`models/control_inpaint.py`, ComfyUI's VAE and its ControlNets."""

    DISPLAY_NAME = "ControlNet Inpaint"
    DESCRIPTION = (
        "Inpaints with an ordinary model and an inpaint ControlNet: control_v11p_sd15_inpaint (webui's "
        "inpaint_only, with prefill = lama inpaint_only+lama), or AliMama's for FLUX. Known latents are put "
        "back at every step, and the composite mask takes the rest of the image back exactly."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT", "IMAGE", "MASK")
    RETURN_NAMES = ("positive", "negative", "latent", "image", "composite")
    OUTPUT_TOOLTIPS = (
        "The prompt with the ControlNet.",
        "The negative prompt with the ControlNet.",
        "The image, its hole filled if asked for, encoded: to sample from.",
        "The image at the result's size: destination of ImageCompositeMasked.",
        "How much of the result goes into it: its mask. 0 more than 6 px away from the hole.",
    )
    FUNCTION = "condition"
    SEARCH_ALIASES = ["inpaint_only", "inpaint_only+lama", "inpaint preprocessor", "alimama inpainting"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "positive": socket("CONDITIONING")("The encoded prompt: what the whole image shows."),
                "negative": socket("CONDITIONING")("The encoded negative prompt."),
                "control_net": socket("CONTROL_NET")("From Load ControlNet Model: one for inpainting."),
                "vae": socket("VAE")("The model's own autoencoder."),
                "image": socket("IMAGE")("The image to repair, or an outpaint canvas."),
                "mask": socket("MASK")("White is repainted; cut at 0.5. Any size, not empty."),
            },
            "optional": {
                "mode": choice(MODES, MODES[0])(
                    "inpaint_only: known latents are put back at every step. global_harmonious: the "
                    "ControlNet alone keeps them, so the rest may change a little to fit."
                ),
                "prefill": choice(PREFILLS, NONE)(
                    "What stands in the hole before sampling. lama: inpaint_only+lama, for removing things "
                    "and for outpainting; needs a file. The others as in Fill Hole."
                ),
                "lama_file": choice(lama_files())(
                    "For lama: a file in models/inpaint or models/upscale_models (big-lama.pt)."
                ),
                "strength": number(1.0, 0.0, 10.0, step=0.01)("Of the ControlNet."),
                "start_percent": number(0.0, 0.0, 1.0, step=0.001, advanced=True)(
                    "Where in the schedule the ControlNet begins."
                ),
                "end_percent": number(1.0, 0.0, 1.0, step=0.001, advanced=True)("Where it ends."),
                "policy": widgets.policy(advanced=True)(
                    "How sides that do not divide by 8 are made to. A canvas' or crop's always divide."
                ),
            },
        }

    def condition(
        self,
        positive: list,
        negative: list,
        control_net: Any,
        vae: Any,
        image: Tensor,
        mask: Tensor,
        mode: str = MODES[0],
        prefill: str = NONE,
        lama_file: str = NONE,
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        policy: str = "stretch",
    ) -> tuple[list, list, dict, Tensor, Tensor]:
        """(positive, negative, latent, image [B,h,w,3], composite [B,h,w]) for image [B,H,W,C] and mask.

        Raises ValueError for an empty mask, a range that ends before it starts, and a missing LaMa file.
        """
        from ..models import comfy_control

        if start_percent > end_percent:
            raise ValueError(f"start_percent is {start_percent} and end_percent {end_percent}: end later.")
        options = {"model": lama_path(lama_file)} if prefill == "lama" else {}
        given = control_inpaint.prepared(image, mask, prefill=prefill, policy=policy, **options)
        latent = comfy_control.latent(vae, given, mode == "inpaint_only")
        positive, negative = comfy_control.applied(
            positive, negative, control_net, vae, given, strength, start_percent, end_percent
        )
        return positive, negative, latent, given.image, control_inpaint.composite_mask(given.mask)


NODES = [DiptychControlNetInpaint]
