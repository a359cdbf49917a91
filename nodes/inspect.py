"""See what the models see: the tokens of a prompt, the shapes of a call, the noise of a schedule."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .shown import shown
from .widgets import choice, integer, socket, text

CATEGORY = "diptych/inspect"


class DiptychTokenInspector:
    """`models/inspect/tokens.py`."""

    DISPLAY_NAME = "Token Inspector"
    DESCRIPTION = (
        "Shows a prompt as the text encoders get it: every token of CLIP (77) and T5 (512), the weights, "
        "where padding begins, and which words were cut off or come too late to be read."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE", "STRING", "STRING")
    RETURN_NAMES = ("image", "report", "warning")
    OUTPUT_TOOLTIPS = (
        "The tables as an image.",
        "The tables as text, a line for each token.",
        "What an encoder misses of the prompt, one sentence each; empty when all of it is read.",
    )
    FUNCTION = "inspect"
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["tokenizer", "token count", "77 tokens", "prompt too long", "truncated"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {"text": text(multiline=True)("The prompt, as it goes into CLIP Text Encode.")},
            "optional": {
                "clip": socket("CLIP")(
                    "Whose tokens to show. Not connected: FLUX's CLIP-L and T5, without loading a model."
                )
            },
        }

    def inspect(self, text: str, clip: Any | None = None) -> dict:
        """(image [1,H,960,3], report, warning), shown on the node too."""
        from ..models.inspect import comfy_tokens, tokens

        encoders = comfy_tokens.read(clip, text)
        image: Tensor = tokens.image(encoders, text)
        report, told = tokens.report(encoders), tokens.warning(encoders)
        return {"ui": shown(report, image), "result": (image, report, told)}


class DiptychShapeWalk:
    """`models/inspect/shapes.py`."""

    DISPLAY_NAME = "Shape Walk"
    DESCRIPTION = (
        "Tells one model call stage by stage for this very input: latents, joined channels or joined "
        "references, packed tokens, position ids, text, blocks, and what attention costs. Nothing is run."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "report")
    OUTPUT_TOOLTIPS = ("The stages as an image.", "The stages as text, a line each.")
    FUNCTION = "walk"
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["shapes", "tokens", "flops", "attention memory", "sequence length", "how it works"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "model": socket("MODEL")("FLUX (Fill, Kontext, dev) or Stable Diffusion 1 and 2."),
                "latent": socket("LATENT")("What the sampler would get as latent_image."),
                "conditioning": socket("CONDITIONING")(
                    "What the sampler would get as positive, behind the conditioner: references and known "
                    "images are read from it."
                ),
            }
        }

    def walk(self, model: Any, latent: dict, conditioning: list) -> dict:
        """(image [1,H,960,3], report), shown on the node too. Raises ValueError for other models."""
        from ..models.inspect import comfy_shapes, shapes

        walk = comfy_shapes.walk(model, latent, conditioning)
        image, report = shapes.image(walk), shapes.report(walk)
        return {"ui": shown(report, image), "result": (image, report)}


class DiptychSchedulePlot:
    """`models/inspect/schedules.py`."""

    DISPLAY_NAME = "Schedule Plot"
    DESCRIPTION = (
        "Draws noise schedules side by side on one scale: DDPM/DDIM alphas, flow-matching sigmas without and "
        "with FLUX's shift of the real token count, and up to three of your own."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "report")
    OUTPUT_TOOLTIPS = ("The plots.", "The share of noise at each step, as text.")
    FUNCTION = "plot"
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["sigmas plot", "scheduler curve", "alphas", "flow matching", "shift", "noise schedule"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        own = "A schedule to compare, from any scheduler node."
        return {
            "required": {
                "steps": integer(20, 1, 1000)("Of the three schedules that are always drawn."),
                "width": integer(1024, 16, 16384, step=16)("Of the image that is denoised, in pixels."),
                "height": integer(1024, 16, 16384, step=16)("A diptych counts with both panels."),
            },
            "optional": {
                "latent": socket("LATENT")("Its size is taken instead of width and height."),
                "sigmas_1": socket("SIGMAS")(own),
                "sigmas_2": socket("SIGMAS")(own),
                "sigmas_3": socket("SIGMAS")(own),
                "sigmas_are": choice(["auto", "flow", "eps"], "auto", advanced=True)(
                    "What the connected sigmas mean. flow: the share of noise (FLUX). eps: noise added to "
                    "the image (Stable Diffusion). auto: eps if one is above 1."
                ),
            },
        }

    def plot(
        self,
        steps: int,
        width: int,
        height: int,
        latent: dict | None = None,
        sigmas_1: Tensor | None = None,
        sigmas_2: Tensor | None = None,
        sigmas_3: Tensor | None = None,
        sigmas_are: str = "auto",
    ) -> dict:
        """(image [1,H,960,3], report), shown on the node too. Raises ValueError for an empty schedule."""
        from ..models.inspect import schedules

        if latent is not None:
            height, width = (8 * side for side in latent["samples"].shape[-2:])
        given = [(s, sigmas_are) for s in (sigmas_1, sigmas_2, sigmas_3) if s is not None]
        runs = schedules.compared(steps, height, width, given)
        image, report = schedules.image(runs, height, width), schedules.report(runs)
        return {"ui": shown(report, image), "result": (image, report)}


NODES = [DiptychTokenInspector, DiptychShapeWalk, DiptychSchedulePlot]
