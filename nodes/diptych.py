"""Diptych Builder and Diptych Split: the two ends of an in-context edit."""

from __future__ import annotations

from torch import Tensor

from ..models import diptych as dp
from . import widgets
from .widgets import choice, integer, number, socket, switch, text


class DiptychBuilder:
    """`models/diptych.build`."""

    DISPLAY_NAME = "Diptych Builder"
    DESCRIPTION = (
        "Sets an image beside the place for its edit, with the mask and the prompt that in-context editing "
        "(ICEdit on FLUX.1-Fill) expects. Takes any size, batches, gray images and alpha; Diptych Split "
        "brings the edit back to the image's own size."
    )
    CATEGORY = "diptych"
    RETURN_TYPES = ("IMAGE", "MASK", "STRING", "DIPTYCH_LAYOUT")
    RETURN_NAMES = ("diptych", "mask", "prompt", "layout")
    OUTPUT_TOOLTIPS = (
        "Both panels in one image: to the image input of the Flux Fill Conditioner.",
        "White where the model repaints: to the mask input of the Flux Fill Conditioner.",
        "The instruction within the sentence ICEdit was trained on: to the text of a CLIP Text Encode.",
        "Where everything is: to Diptych Split.",
    )
    FUNCTION = "build"
    SEARCH_ALIASES = ["icedit", "in-context edit", "side by side", "instruction edit", "diptych create"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "image": socket("IMAGE")("The image to edit, of any size; a batch gives one diptych each."),
                "instruction": text("", multiline=True)(
                    "What to change, such as: make the hat red. The sentence around it is added."
                ),
            },
            "optional": {
                "edit_mask": socket("MASK")(
                    "Repaint only here (white); everything else comes back exactly. An empty mask means the "
                    "whole image. ICEdit was trained on whole panels: if a local edit comes out weak, leave "
                    "this open and give the mask to Diptych Split instead."
                ),
                "panel_width": integer(dp.PANEL_WIDTH, 0, 4096, step=16)(
                    "Width of one panel in pixels; the height follows from the image. 512 is what ICEdit was "
                    "trained on; 0 keeps the image's own size."
                ),
                "policy": widgets.policy()(
                    "How both sides become multiples of 16. stretch: by up to 8 pixels. crop: borders are "
                    "left out, and come back in Diptych Split. pad: the edge's pixels are repeated. auto: "
                    "stretch unless that bends the image by more than 5 %."
                ),
                "side": choice(dp.SIDES, "right")(
                    "Where the edit goes. ICEdit was trained on right. none: a single panel, for plain "
                    "masked filling; the instruction is then the whole prompt."
                ),
                "second_panel": choice(dp.SECOND, "copy", advanced=True)(
                    "What the pixels to repaint hold before sampling. At denoise 1.0 the result does not "
                    "depend on it."
                ),
                "second_seed": widgets.seed(advanced=True)("For second_panel = noise."),
                "template": text(dp.ICEDIT_TEMPLATE, multiline=True, advanced=True)(
                    "The sentence around the instruction. The words instruction, edited, source and "
                    "arrangement stand in braces in it; the last three follow the side, as the default does."
                ),
                "keep_rest": switch(False, advanced=True)(
                    "Adds that other regions stay the same: helps when an edit changes too much."
                ),
            },
        }

    def build(
        self,
        image: Tensor,
        instruction: str,
        edit_mask: Tensor | None = None,
        panel_width: int = dp.PANEL_WIDTH,
        policy: str = "stretch",
        side: str = "right",
        second_panel: str = "copy",
        second_seed: int = 0,
        template: str = dp.ICEDIT_TEMPLATE,
        keep_rest: bool = False,
    ) -> tuple[Tensor, Tensor, str, dp.Layout]:
        """(diptych [B,h,w,3], mask [B,h,w], prompt, layout) of an image [B,H,W,C].

        Raises ValueError for an empty instruction and what `dp.build` refuses.
        """
        if side != "none" and not instruction.strip():
            raise ValueError("instruction is empty: say what to change, such as: make the hat red.")
        return tuple(
            dp.build(
                image,
                instruction,
                edit_mask=edit_mask,
                panel_width=panel_width,
                policy=policy,
                side=side,
                second=second_panel,
                seed=second_seed,
                template=template,
                keep_rest=keep_rest,
            )
        )


class DiptychSplit:
    """`models/diptych.split`."""

    DISPLAY_NAME = "Diptych Split"
    DESCRIPTION = (
        "Takes the edit out of a diptych and returns it at the image's own size, in float. Pixels outside "
        "the edit mask, cropped borders and alpha are the source's own, exactly. Also undoes the sizing of "
        "the Kontext Conditioner."
    )
    CATEGORY = "diptych"
    RETURN_TYPES = ("IMAGE", "IMAGE")
    RETURN_NAMES = ("edited", "source_panel")
    OUTPUT_TOOLTIPS = (
        "The edited image, of the source's size.",
        "The diptych's other panel at that size: the source as the model gave it back, to compare with.",
    )
    FUNCTION = "split"
    SEARCH_ALIASES = ["crop panel", "stitch", "paste back", "restore size", "uncrop"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "image": socket("IMAGE")(
                    "The decoded diptych (or Kontext result); also a batch, or upscaled."
                ),
                "layout": socket("DIPTYCH_LAYOUT")("From the Diptych Builder or the Kontext Conditioner."),
            },
            "optional": {
                "source": socket("IMAGE")(
                    "The image to paste into. Left open, it is the one the layout was made from; a larger "
                    "version of it (same aspect) gives a result of that size."
                ),
                "mask": socket("MASK")(
                    "Take the edit only here. Left open or empty, the edit_mask of the builder counts."
                ),
                "paste": choice(dp.PASTE, "auto")(
                    "Which pixels of the edit to take; all others are exactly the source's. panel: all. "
                    "mask: inside the mask. changed: those that differ from the diptych's other panel. auto: "
                    "mask if there is one, else panel."
                ),
                "feather": integer(0, 0, 512)(
                    "Fade from source to edit over so many pixels inside the pasted region."
                ),
                "grow": integer(0, -512, 512, advanced=True)(
                    "Enlarge the pasted region by so many pixels first; below 0 shrinks it."
                ),
                "threshold": number(dp.CHANGE_THRESHOLD, 0.005, 1.0, step=0.005, advanced=True)(
                    "For paste = changed: how much a channel must differ (0 to 1). The VAE alone makes 0.02 "
                    "to 0.05."
                ),
            },
        }

    def split(
        self,
        image: Tensor,
        layout: dp.Layout,
        source: Tensor | None = None,
        mask: Tensor | None = None,
        paste: str = "auto",
        feather: int = 0,
        grow: int = 0,
        threshold: float = dp.CHANGE_THRESHOLD,
    ) -> tuple[Tensor, Tensor]:
        """(edited, source panel), each [B,H,W,3] or [B,H,W,4], of a diptych [B,h,w,3].

        Raises ValueError for what `dp.split` refuses.
        """
        return tuple(
            dp.split(
                image,
                layout,
                source=source,
                mask=mask,
                paste=paste,
                feather=feather,
                grow=grow,
                threshold=threshold,
            )
        )


NODES = [DiptychBuilder, DiptychSplit]
