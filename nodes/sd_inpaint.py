"""Inpainting nodes for Stable Diffusion: models that know of a mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..models import inpaint_masks, pixels
from . import widgets
from .conditioning import with_values
from .widgets import choice, integer, number, socket, switch

CATEGORY = "diptych/inpaint"
STARTS = ("image", "noise")
EDGES = ("hard", "soft")
LATENT_CHANNELS = 4


class DiptychSDInpaintConditioner:
    """`models/inpaint_masks.py` and ComfyUI's VAE."""

    DISPLAY_NAME = "SD Inpaint Conditioner"
    DESCRIPTION = (
        "Conditions Stable Diffusion's inpainting models (nine input channels: SD 1.5, SD 2, SDXL "
        "inpainting, PowerPaint, any merge of them) on an image and the mask to repaint. How the mask "
        "becomes latent cells is a choice: the usual one repaints every cell that the mask touches, so no "
        "seam is left; nearest is StableDiffusionInpaintPipeline's."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT", "FLOAT", "MODEL")
    RETURN_NAMES = ("positive", "negative", "latent", "denoise", "model")
    OUTPUT_TOOLTIPS = (
        "The prompt with mask and masked image.",
        "The negative prompt with mask and masked image.",
        "What to sample from: the encoded image, or zeros with start = noise.",
        "The strength, for the denoise of a sampler or scheduler.",
        "The connected model; with edge = soft one that takes gray cells. Nothing if none is connected.",
    )
    FUNCTION = "condition"
    SEARCH_ALIASES = ["inpaint model conditioning", "sd inpainting", "runwayml inpainting", "9 channels"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "positive": socket("CONDITIONING")("The encoded prompt: what the whole image shows."),
                "negative": socket("CONDITIONING")("The encoded negative prompt."),
                "vae": socket("VAE")("The model's own autoencoder."),
                "image": socket("IMAGE")("The image to repair, or an outpaint canvas."),
                "mask": socket("MASK")("White is repainted. Any size, not empty."),
            },
            "optional": {
                "model": socket("MODEL")(
                    "The model you will sample with: refuses one without a mask channel, which would ignore "
                    "image and mask. Needed for edge = soft."
                ),
                "mask_resize": choice(inpaint_masks.MASK_RESIZE, "max")(
                    "How 8 x 8 pixels of mask become one cell. max: repainted if any pixel is. nearest: the "
                    "first pixel decides, as in diffusers. bilinear: the middle, as in core. area: the mean."
                ),
                "strength": number(1.0, 0.01, 1.0, step=0.01)(
                    "1 repaints from noise alone. Below, the masked part is changed, not replaced: link "
                    "`denoise` to the sampler's, which starts from the encoded image."
                ),
                "noise_mask": switch(False)(
                    "On: unmasked latents are put back at every step, as InpaintModelConditioning does. Off: "
                    "the model alone keeps them, as in StableDiffusionInpaintPipeline."
                ),
                "edge": choice(EDGES, "hard")(
                    "hard: the mask is cut at `threshold`. soft: gray values reach the model, and pixels "
                    "under them are half hidden; needs `model`."
                ),
                "threshold": number(0.5, 0.01, 1.0, step=0.01, advanced=True)(
                    "A mask pixel of at least this much is repainted."
                ),
                "masked": choice(inpaint_masks.MASKED, "gray", advanced=True)(
                    "What the model sees under the mask. gray: nothing, as it was trained. original: the "
                    "image itself, for gentle changes."
                ),
                "start": choice(STARTS, "image", advanced=True)(
                    "At strength 1, image: noise added to the encoded image, as core does; Tiled Sampler "
                    "needs it. noise: noise alone, as StableDiffusionInpaintPipeline."
                ),
                "policy": widgets.policy(advanced=True)(
                    "How sides that do not divide by 8 are made to. A canvas' or crop's always divide."
                ),
            },
        }

    def condition(
        self,
        positive: list,
        negative: list,
        vae: Any,
        image: Tensor,
        mask: Tensor,
        model: Any = None,
        mask_resize: str = "max",
        strength: float = 1.0,
        noise_mask: bool = False,
        edge: str = "hard",
        threshold: float = 0.5,
        masked: str = "gray",
        start: str = "image",
        policy: str = "stretch",
    ) -> tuple[list, list, dict, float, Any]:
        """(positive, negative, latent, denoise, model) for image [B,H,W,C] and mask [B,h,w] of any size.

        Raises ValueError for a model without mask channel, an empty mask, and settings that exclude another.
        """
        rule = inpaint_masks.MaskRule(mask_resize, threshold, edge == "soft", masked)
        if start == "noise" and strength < 1:
            raise ValueError(
                f"start is noise but strength is {strength}: choose start = image, or strength 1."
            )
        require_mask_channel(model)
        check_latents(getattr(vae, "latent_channels", LATENT_CHANNELS))
        if rule.soft:
            model = _soft(model)
        image, told = inpaint_masks.prepared(image, mask, rule, policy)
        values = {"concat_latent_image": vae.encode(told.masked), "concat_mask": told.cells}
        if rule.soft:
            values[inpaint_masks.SOFT] = told.cells
        samples = pixels.repeat_batch(vae.encode(image), len(told.cells)).clone()
        latent = {"samples": samples.zero_() if start == "noise" else samples}
        if noise_mask:
            latent["noise_mask"] = told.cells
        return with_values(positive, values), with_values(negative, values), latent, strength, model


def require_mask_channel(model: Any) -> None:
    """Raise ValueError if the model certainly takes no mask; None and unknown kinds of model pass."""
    keys = getattr(getattr(model, "model", None), "concat_keys", None)
    if keys is not None and "mask" not in keys:
        raise ValueError(
            "model has no channel for a mask and would ignore it: load an inpainting checkpoint (nine input "
            "channels), make one with `diptych merge-inpaint`, or use ControlNet Inpaint."
        )


def check_latents(channels: int) -> None:
    """Raise ValueError if a VAE's latents are not Stable Diffusion's."""
    if channels != LATENT_CHANNELS:
        raise ValueError(
            f"vae makes latents of {channels} channels but Stable Diffusion takes {LATENT_CHANNELS}: connect "
            "the checkpoint's own VAE."
        )


def _soft(model: Any) -> Any:
    if model is None:
        raise ValueError(
            "edge is soft but model is not connected: connect it and sample with this node's model, or "
            "choose hard (ComfyUI rounds masks on their way to a model)."
        )
    from ..models.comfy_inpaint import with_soft_mask

    return with_soft_mask(model)


class DiptychWidenInput:
    """`models/comfy_widen.py`."""

    DISPLAY_NAME = "Widen Model Input"
    DESCRIPTION = (
        "Gives an ordinary Stable Diffusion model the nine input channels of an inpainting model, the new "
        "ones zero, so that core's merge nodes can add and subtract the two: custom + (inpaint - base) makes "
        "an inpainting model of any finetune. For merging only."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("For ModelMergeSubtract and ModelMergeAdd, beside an inpainting model.",)
    FUNCTION = "widen"
    SEARCH_ALIASES = ["merge inpainting", "add difference", "pad conv_in", "make inpainting model"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "model": socket("MODEL")("The finetune, or its base: both need it. Not changed."),
                "channels": integer(9, 4, 64)("9 for inpainting models, 8 for InstructPix2Pix and glid."),
            }
        }

    def widen(self, model: Any, channels: int) -> tuple[Any]:
        """The wider MODEL. Raises ValueError for what `comfy_widen.widened` refuses."""
        from ..models.comfy_widen import widened

        return (widened(model, channels),)


NODES = [DiptychSDInpaintConditioner, DiptychWidenInput]
