"""Conditioning nodes for FLUX Fill and FLUX Kontext."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ..models import condition, pixels
from ..models.diptych import Layout
from . import widgets
from .widgets import choice, number, socket, switch

log = logging.getLogger(__name__)

FILL_CHANNELS = 384
METHODS = ("auto", "offset", "index", "uxo")
LATENT_CHANNELS = 16  # of FLUX.1's autoencoder


class DiptychFluxFillConditioner:
    """FLUX Fill's conditioning: `models/condition.py` and ComfyUI's VAE."""

    DISPLAY_NAME = "Flux Fill Conditioner"
    DESCRIPTION = (
        "Conditions FLUX.1-Fill on an image and the mask to repaint, as diffusers' FluxFillPipeline does: "
        "hard mask, gray 0.5 under it, sides in multiples of 16. For diptychs, fills and outpainting. It "
        "needs a Fill model: "
        "ComfyUI silently ignores this conditioning on others, so connect `model` to have it checked."
    )
    CATEGORY = "diptych"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")
    OUTPUT_TOOLTIPS = (
        "The prompt with the masked image. FLUX.1-Fill wants a guidance of 30 (fill) to 50 (ICEdit): Flux "
        "Guidance.",
        "The negative prompt with the masked image.",
        "The encoded image, to sample from.",
    )
    FUNCTION = "condition"
    SEARCH_ALIASES = ["inpaint model conditioning", "flux fill inpaint", "icedit conditioning", "concat mask"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "positive": socket("CONDITIONING")("The encoded prompt."),
                "negative": socket("CONDITIONING")("The encoded negative prompt; without effect at cfg 1."),
                "vae": socket("VAE")("FLUX's autoencoder (ae.safetensors)."),
                "image": socket("IMAGE")("The image to fill, such as the diptych."),
            },
            "optional": {
                "mask": socket("MASK")("White is repainted; binarised at 0.5. Any size, not empty."),
                "mask_tokens": socket("DIPTYCH_MASK_TOKENS")(
                    "Instead of a mask: from the Mask Packer, used as they are, soft if they are soft."
                ),
                "model": socket("MODEL")(
                    "The model you will sample with: refuses anything but FLUX.1-Fill. Not changed."
                ),
                "noise_mask": switch(False)(
                    "On: unmasked latents are also put back at every step (as InpaintModelConditioning "
                    "does). Off: the model alone keeps them, as in FluxFillPipeline."
                ),
                "policy": widgets.policy(advanced=True)(
                    "How sides that do not divide by 16 are made to. A diptych's always divide."
                ),
            },
        }

    def condition(
        self,
        positive: list,
        negative: list,
        vae: Any,
        image: Tensor,
        mask: Tensor | None = None,
        mask_tokens: Tensor | None = None,
        model: Any = None,
        noise_mask: bool = False,
        policy: str = "stretch",
    ) -> tuple[list, list, dict]:
        """(positive, negative, latent): image [B,H,W,C] and mask [B,H,W] encoded into both, and the latent.

        Raises ValueError for a model that is not Fill, a VAE of another model, and what `fill_input` refuses.
        """
        _require_fill(model)
        _require_flux_vae(vae)
        given = condition.fill_input(image, mask, mask_tokens=mask_tokens, policy=policy)
        # Four dimensions: core averages the mask over dimension 1, which must be channels.
        values = {"concat_latent_image": _encode(vae, given.masked), "concat_mask": given.mask}
        latent = {"samples": _encode_repeated(vae, given.image, len(given.mask))}
        if noise_mask:
            latent["noise_mask"] = given.mask
        return with_values(positive, values), with_values(negative, values), latent


class DiptychKontextConditioner:
    """Kontext's references: `models/condition.py` and ComfyUI's VAE."""

    DISPLAY_NAME = "Kontext Conditioner"
    DESCRIPTION = (
        "Gives FLUX.1 Kontext one or more reference images at a size it was trained on, and the layout "
        "that takes the result back to the first image's own size (Diptych Split). Chain several for more "
        "references. Models that know no references ignore them."
    )
    CATEGORY = "diptych"
    RETURN_TYPES = ("CONDITIONING", "LATENT", "DIPTYCH_LAYOUT")
    RETURN_NAMES = ("conditioning", "latent", "layout")
    OUTPUT_TOOLTIPS = (
        "The prompt with the references added. FLUX.1 Kontext wants a guidance of 2.5: Flux Guidance.",
        "The first image encoded: sets the size of the result.",
        "How `image` was sized: to Diptych Split, which undoes it.",
    )
    FUNCTION = "condition"
    SEARCH_ALIASES = ["reference latent", "flux kontext image scale", "kontext reference", "kontext inpaint"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "conditioning": socket("CONDITIONING")("The encoded prompt, or another Kontext Conditioner."),
                "vae": socket("VAE")("FLUX's autoencoder (ae.safetensors)."),
                "image": socket("IMAGE")("The image to edit; the result has its size."),
            },
            "optional": {
                "image_2": socket("IMAGE")("A second reference, of any size."),
                "image_3": socket("IMAGE")("A third reference, of any size."),
                "mask": socket("MASK")(
                    "Repaint `image` only here (an empty mask means all of it); elsewhere Diptych Split "
                    "returns it exactly."
                ),
                "size_policy": choice(condition.SIZE_POLICIES, "preferred")(
                    "preferred: the nearest of Kontext's 17 trained sizes (about 1 megapixel). keep: the "
                    "image's own size in multiples of 16. megapixels: its aspect at that area."
                ),
                "policy": widgets.policy(default="auto")(
                    "How an image meets that size. stretch: as diffusers. crop: borders are left out and "
                    "come back in Diptych Split. pad: the edge's pixels are repeated. auto: stretch by up to "
                    "5 %, crop by up to 10 %, else pad; the console says which."
                ),
                "reference_method": choice(METHODS, "auto")(
                    "Where references lie for the model. auto: as set before, else offset. offset: side by "
                    "side. index: stacked, numbered. uxo: diagonal, for UNO and USO models."
                ),
                "batch": choice(["edits", "references"], "edits", advanced=True)(
                    "A batch of images means: one edit each, or several references of one edit."
                ),
                "megapixels": number(1.0, 0.05, 8.0, step=0.05, advanced=True)(
                    "For size_policy = megapixels."
                ),
            },
        }

    def condition(
        self,
        conditioning: list,
        vae: Any,
        image: Tensor,
        image_2: Tensor | None = None,
        image_3: Tensor | None = None,
        mask: Tensor | None = None,
        size_policy: str = "preferred",
        policy: str = "auto",
        reference_method: str = "auto",
        batch: str = "edits",
        megapixels: float = 1.0,
    ) -> tuple[list, dict, Layout]:
        """(conditioning, latent, layout) of references [B,H,W,C], each at a size that Kontext takes.

        Raises ValueError for a VAE that is not FLUX's, and what `condition.reference` refuses.
        """
        _require_flux_vae(vae)
        sizing = {"size": size_policy, "policy": policy, "megapixels": megapixels}
        images = [pixels.as_image(image)]
        images += [
            pixels.as_image(x, n) for x, n in ((image_2, "image_2"), (image_3, "image_3")) if x is not None
        ]
        if batch == "references":
            images = [single for several in images for single in several.split(1)]
        first, *others = [
            condition.reference(view, mask=None if i else mask, **sizing) for i, view in enumerate(images)
        ]
        for place, view in enumerate((first, *others), 1):
            log.info("Kontext Conditioner: image %d: %s", place, view.layout)
        references = [_encode(vae, view.image) for view in (first, *others)]
        count = max(len(encoded) for encoded in references)
        latent = {"samples": pixels.repeat_batch(references[0], count).clone()}
        if first.mask is not None:
            latent["noise_mask"] = first.mask
        conditioning = with_values(conditioning, {"reference_latents": references}, append=True)
        if reference_method != "auto":
            conditioning = with_values(conditioning, {"reference_latents_method": reference_method})
        return conditioning, latent, first.layout


def with_values(conditioning: list, values: dict, append: bool = False) -> list:
    """Set (or append to) values in a copy of a conditioning, leaving the original and its lists alone."""
    copies = []
    for embedding, options in conditioning:
        old = options if append else {}
        joined = {key: [*old[key], *value] if old.get(key) else value for key, value in values.items()}
        copies.append([embedding, {**options, **joined}])
    return copies


def _encode_repeated(vae: Any, image: Tensor, batch: int) -> Tensor:
    """Encode, once if it is one image for a whole batch."""
    return pixels.repeat_batch(_encode(vae, image), batch).clone()


def _encode(vae: Any, image: Tensor) -> Tensor:
    """Latents of an image. Raises ValueError if they are not FLUX's."""
    latents = vae.encode(image)
    _check_channels(latents.shape[1])
    return latents


def _require_flux_vae(vae: Any) -> None:
    """Raise ValueError, before anything is encoded, if ComfyUI knows the VAE for another model's."""
    channels = getattr(vae, "latent_channels", None)
    if isinstance(channels, int):
        _check_channels(channels)


def _check_channels(channels: int) -> None:
    if channels != LATENT_CHANNELS:
        raise ValueError(
            f"vae makes latents of {channels} channels but FLUX.1 takes {LATENT_CHANNELS}: load FLUX's "
            "autoencoder (ae.safetensors) and connect that."
        )


def _require_fill(model: Any) -> None:
    """Raise ValueError if the model certainly is not FLUX.1-Fill; unknown kinds of model pass."""
    if model is None:
        return
    inner = getattr(model, "model", None)
    weight = getattr(getattr(getattr(inner, "diffusion_model", None), "img_in", None), "weight", None)
    shape = getattr(weight, "shape", None)
    if shape is not None and len(shape) == 2:
        channels = shape[1]
    else:  # other runtimes keep no such weight, but ComfyUI's description (channels per latent cell)
        config = getattr(getattr(inner, "model_config", None), "unet_config", None) or {}
        channels = config["in_channels"] * 4 if "in_channels" in config else None
    if channels not in (None, FILL_CHANNELS):
        raise ValueError(
            f"model takes {channels} input channels, so it is not FLUX.1-Fill ({FILL_CHANNELS}) and would "
            "ignore the image and mask: load a Fill model, or disconnect `model` to skip this check."
        )


NODES = [DiptychFluxFillConditioner, DiptychKontextConditioner]
