"""PowerPaint Prompt: the words of PowerPaint v1's tasks."""

from __future__ import annotations

from typing import Any

from ..models import powerpaint
from .menus import check_embedding
from .sd_inpaint import CATEGORY
from .widgets import choice, number, socket, text


class DiptychPowerPaintPrompt:
    """`models/powerpaint.py` and ComfyUI's CLIP."""

    DISPLAY_NAME = "PowerPaint Prompt"
    DESCRIPTION = (
        "Writes, encodes and blends the prompts of PowerPaint v1, a Stable Diffusion inpainting model that "
        "is told its task by learnt words: remove an object, outpaint, fill a shape, paint what the prompt "
        "says. Those words are embeddings, which `diptych powerpaint split` cuts out of its text encoder."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    OUTPUT_TOOLTIPS = (
        "To SD Inpaint Conditioner.",
        "To SD Inpaint Conditioner. PowerPaint wants a cfg of 7.5; 12 to remove objects.",
    )
    FUNCTION = "encode"
    SEARCH_ALIASES = ["powerpaint", "object removal", "shape guided", "task prompt", "remove object"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "clip": socket("CLIP")("CLIP-L of Stable Diffusion 1.5."),
                "prompt": text(multiline=True)("What to paint. May be empty for remove and outpaint."),
                "negative_prompt": text(multiline=True)("What not to paint. May be empty."),
                "task": choice(powerpaint.TASKS, "remove")(
                    "remove: an empty scene in the hole. outpaint: the scene goes on. shape: the prompt's "
                    "object in the mask's shape. text: the prompt's object anywhere in the mask."
                ),
                "fitting": number(1.0, 0.0, 1.0, step=0.01)(
                    "For shape: how closely the object follows the mask; 0.5 and less treats it as a hint."
                ),
            }
        }

    def encode(
        self, clip: Any, prompt: str, negative_prompt: str, task: str, fitting: float
    ) -> tuple[list, list]:
        """(positive, negative). Raises ValueError where an embedding of the task is not in its folder."""
        for token in powerpaint.used_tokens(task):
            check_embedding(token)
        texts = powerpaint.prompts(task, prompt, negative_prompt, "embedding:{}".format)
        return tuple(_encoded(clip, pair, fitting) for pair in texts)


def _encoded(clip: Any, pair: powerpaint.Prompts, fitting: float) -> list:
    first = clip.encode_from_tokens_scheduled(clip.tokenize(pair.first))
    if pair.first == pair.second:
        return first
    second = clip.encode_from_tokens_scheduled(clip.tokenize(pair.second))
    mixed = []
    for (one, options), (other, others) in zip(first, second, strict=True):
        options = dict(options)
        if options.get("pooled_output") is not None:
            pooled = options["pooled_output"], others["pooled_output"]
            options["pooled_output"] = powerpaint.blend(*pooled, fitting)
        mixed.append([powerpaint.blend(one, other, fitting), options])
    return mixed


NODES = [DiptychPowerPaintPrompt]
