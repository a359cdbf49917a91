"""The bundled tiny models and images of their world: all that the example workflows need to run at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .guard import validated
from .widgets import choice, integer

OPERATIONS = ["any", "recolour", "replace", "remove", "add", "move", "background"]
SHAPES = ["one to three", "one"]
MODELS = ["fill", "kontext", "sd_inpaint", "glid"]


class DiptychTinyModelLoader:
    """`models/tiny/comfy.load`."""

    DISPLAY_NAME = "Load Tiny Demo Model"
    DESCRIPTION = (
        "Loads one of the small models that come with this pack, as ordinary MODEL, CLIP and VAE. "
        "They know only small images of coloured shapes (64x64, a diptych 128x64) and run anywhere in "
        "seconds, so that every workflow can be tried before a large model is downloaded."
    )
    CATEGORY = "diptych/demo"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    RETURN_NAMES = ("model", "clip", "vae")
    OUTPUT_TOOLTIPS = (
        "The diffusion model, for any sampler, LoRA loader or model patch.",
        "CLIP and T5 text encoders, for CLIPTextEncode and other text nodes.",
        "The autoencoder (16 latent channels, 8 pixels to a latent), for encoding and decoding.",
    )
    FUNCTION = "load"
    NEEDS = ("diffusers", "transformers")
    SEARCH_ALIASES = ["diptych demo", "tiny flux", "test model", "bundled model", "shapes"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "which": choice(MODELS, "fill")(
                    "fill: FLUX Fill in small, for diptych edits and masked fills (with the Flux Fill "
                    "Conditioner). kontext: FLUX Kontext in small, edits a reference image (with the Kontext "
                    "Conditioner). sd_inpaint: Stable Diffusion inpainting in small (with the "
                    "SD Inpaint Conditioner). glid: glid-3-xl-stable in small (with the Glid Conditioner)."
                )
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, which: object = None) -> bool | str:
        """True, or what is not installed."""
        return validated(cls, which=which)

    def load(self, which: str) -> tuple[Any, Any, Any]:
        """(MODEL, CLIP, VAE). Raises ValueError if the pack was installed without the weights."""
        from ..models import tiny
        from ..models.tiny import comfy

        folder = tiny.folder() / which
        if not folder.is_dir():
            raise ValueError(
                f"the tiny {which} model is missing from {folder.parent}: reinstall the whole pack"
            )
        return comfy.load(folder)


class DiptychDemoImage:
    """One held-out edit of the shapes world, `training/tiny/shapes.py`."""

    DISPLAY_NAME = "Demo Image (Shapes)"
    DESCRIPTION = (
        "Draws a small image of coloured shapes with an edit to ask for, the region it touches, and the "
        "image that a perfect edit would give. This is the world that the tiny demo models know; "
        "these images were held out of their training."
    )
    CATEGORY = "diptych/demo"
    RETURN_TYPES = ("IMAGE", "STRING", "MASK", "IMAGE", "STRING")
    RETURN_NAMES = ("image", "instruction", "edit_mask", "expected", "caption")
    OUTPUT_TOOLTIPS = (
        "The image to edit.",
        "What to change, in words that the tiny models know.",
        "1 where the edit changes something.",
        "What a perfect edit looks like, to compare with.",
        "What the expected image shows, as a prompt for a masked fill.",
    )
    FUNCTION = "draw"
    SEARCH_ALIASES = ["test image", "shapes", "sample image", "example image"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {"example": integer(0, 0, 9999)("Which of the images; each has its own edit.")},
            "optional": {
                "operation": choice(OPERATIONS, "any")(
                    "The kind of edit to ask for; any takes them in turn."
                ),
                "size": integer(64, 32, 1024, step=8, advanced=True)(
                    "Width and height in pixels. The tiny models expect 64, the multimodal one 56."
                ),
                "shapes": choice(SHAPES, "one to three", advanced=True)(
                    "How many shapes the image has before the edit. The tiny multimodal model knows one only."
                ),
            },
        }

    def draw(
        self, example: int, operation: str = "any", size: int = 64, shapes: str = "one to three"
    ) -> tuple[Tensor, str, Tensor, Tensor, str]:
        """(source [1,H,W,3], instruction, mask [1,H,W], target [1,H,W,3], caption of the target).

        Raises ValueError for removing the only shape.
        """
        from ..training.tiny.shapes import edit_pairs

        operations = OPERATIONS[1:] if operation == "any" else [operation]
        single = shapes == "one"
        pair = next(edit_pairs(example, 1, "test", size=size, operations=operations, single=single))
        return (
            pair.source[None],
            pair.instruction,
            pair.mask[None],
            pair.target[None],
            pair.caption,
        )


NODES = [DiptychTinyModelLoader, DiptychDemoImage]
