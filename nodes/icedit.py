"""ICEdit in as few nodes as in its authors' own pack: an image file as a diptych, an instruction encoded.

They also stand in for that pack's nodes where it is absent (`replaced.py`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..models import diptych as dp
from . import menus, widgets
from .guard import short
from .widgets import choice, integer, socket, switch, text


class DiptychLoadImage:
    """A file of the input folder through core's Load Image, then `models/diptych.build`."""

    DISPLAY_NAME = "Load Image as Diptych"
    DESCRIPTION = (
        "Loads an image file, or takes an image, and sets it beside the place for its edit: the diptych and "
        "the mask that ICEdit expects. Encode Edit Instruction writes the words; Diptych Split brings the "
        "edit back to the image's own size."
    )
    CATEGORY = "diptych"
    RETURN_TYPES = ("IMAGE", "MASK", "IMAGE", "DIPTYCH_LAYOUT")
    RETURN_NAMES = ("diptych", "mask", "source", "layout")
    OUTPUT_TOOLTIPS = (
        "Both panels in one image: to the image input of the Flux Fill Conditioner.",
        "White where the model repaints: to the mask input of the Flux Fill Conditioner.",
        "The image itself, at its own size.",
        "Where everything is: to Diptych Split.",
    )
    FUNCTION = "load"
    SEARCH_ALIASES = ["diptych create", "icedit", "load image", "side by side"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "image": choice([menus.NO_FILE, *menus.input_images()], image_upload=True)(
                    "A file of ComfyUI's input folder; None where image_input is connected."
                ),
            },
            "optional": {
                "image_input": socket("IMAGE")("Taken instead of the file; a batch gives one diptych each."),
                "panel_width": integer(dp.PANEL_WIDTH, 0, 4096, step=16)(
                    "Width of one panel in pixels; the height follows from the image. 512 is what ICEdit was "
                    "trained on; 0 keeps the image's own size."
                ),
                "policy": widgets.policy()(
                    "How both sides become multiples of 16: see Diptych Builder. stretch: by up to 8 pixels."
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, image: str | None) -> bool | str:
        """True, or what to say of a file that is not there."""
        linked = image is None
        if linked or image == menus.NO_FILE or menus.input_image_exists(image):
            return True
        return _absent(image)

    @classmethod
    def IS_CHANGED(cls, image: str | None, **_: object) -> str:
        """Another text once the file changes."""
        return menus.input_image_fingerprint(image)

    def load(
        self,
        image: str,
        image_input: Tensor | None = None,
        panel_width: int = dp.PANEL_WIDTH,
        policy: str = "stretch",
    ) -> tuple[Tensor, Tensor, Tensor, dp.Layout]:
        """(diptych [B,h,w,3], mask [B,h,w], source [B,H,W,C], layout). Raises ValueError without an image."""
        source = image_input if image_input is not None else _file(image)
        built = dp.build(source, "", panel_width=panel_width, policy=policy)
        return built.image, built.mask, source, built.layout


class DiptychInstruction:
    """`models/prompt.format_prompt`, then ComfyUI's CLIP."""

    DISPLAY_NAME = "Encode Edit Instruction"
    DESCRIPTION = (
        "Encodes an instruction within the sentence that ICEdit was trained on: Diptych Builder's prompt and "
        "CLIP Text Encode in one node. The conditioning goes through Flux Guidance (50 for ICEdit) to the "
        "Flux Fill Conditioner."
    )
    CATEGORY = "diptych"
    RETURN_TYPES = ("CONDITIONING", "STRING")
    RETURN_NAMES = ("conditioning", "prompt")
    OUTPUT_TOOLTIPS = ("The encoded sentence.", "The sentence itself.")
    FUNCTION = "encode"
    SEARCH_ALIASES = ["in-context edit instruction", "icedit prompt", "edit text", "clip text encode"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "instruction": text("", multiline=True, dynamicPrompts=True)(
                    "What to change, such as: make the hat red. The sentence around it is added."
                ),
                "clip": socket("CLIP")("FLUX's text encoders (clip_l and t5xxl)."),
            },
            "optional": {
                "template": text(dp.ICEDIT_TEMPLATE, multiline=True, advanced=True)(
                    "The sentence around the instruction, whose place is the word instruction in braces."
                ),
                "keep_rest": switch(False, advanced=True)(
                    "Adds that other regions stay the same: helps when an edit changes too much."
                ),
            },
        }

    def encode(
        self, instruction: str, clip: Any, template: str = dp.ICEDIT_TEMPLATE, keep_rest: bool = False
    ) -> tuple[list, str]:
        """(conditioning, prompt). Raises ValueError for an empty instruction."""
        if not instruction.strip():
            raise ValueError("instruction is empty: say what to change, such as: make the hat red.")
        prompt = dp.format_prompt(instruction, template, keep_rest=keep_rest)
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt)), prompt


def _file(name: str) -> Tensor:
    if name == menus.NO_FILE:
        raise ValueError("image is None and image_input is open: choose a file, or connect an image.")
    if not menus.input_image_exists(name):
        raise ValueError(_absent(name))
    from nodes import LoadImage

    return LoadImage().load_image(name)[0]


def _absent(name: object) -> str:
    return f"image is {short(name)}, which is not in ComfyUI's input folder: choose or upload a file."


NODES = [DiptychLoadImage, DiptychInstruction]
