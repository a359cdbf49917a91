"""The Edit Score node: numbers about an edit, computed by `training/evaluate/edit_report.py`."""

from __future__ import annotations

from torch import Tensor

from .shown import shown
from .widgets import socket, text


class DiptychEditScore:
    """`training/evaluate/edit_report.py`."""

    DISPLAY_NAME = "Edit Score"
    DESCRIPTION = (
        "Measures an edit: how much of the rest was kept, how much changed where it should, how near it "
        "comes to "
        "an expected image. For images of the shapes world it also says whether the edit was made."
    )
    CATEGORY = "diptych/training"
    RETURN_TYPES = ("FLOAT", "FLOAT", "FLOAT", "FLOAT", "STRING", "IMAGE")
    RETURN_NAMES = ("kept", "changed", "similarity", "success", "report", "annotated")
    OUTPUT_TOOLTIPS = (
        "1 minus the mean difference to the source outside the mask: 1 is untouched.",
        "Mean difference to the source inside the mask: 0 is no edit at all.",
        "SSIM to the expected image if one is connected, else to the source: 1 is equal.",
        "Shapes world: share of images where the edit was made and all else kept. -1 for other images.",
        "The numbers of every image.",
        "Source, edit and their difference side by side.",
    )
    FUNCTION = "score"
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["evaluate edit", "ssim", "psnr", "compare images", "metrics", "edit success"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "edited": socket("IMAGE")("The result, from Diptych Split or VAE Decode."),
                "source": socket("IMAGE")("The image before the edit, of the same size."),
            },
            "optional": {
                "instruction": text("")("What was asked for. Judged for shapes images, else only reported."),
                "mask": socket("MASK")("1 where the edit may change something. Without it: what changed."),
                "expected": socket("IMAGE")("What a perfect edit looks like, if known."),
            },
        }

    def score(
        self,
        edited: Tensor,
        source: Tensor,
        instruction: str = "",
        mask: Tensor | None = None,
        expected: Tensor | None = None,
    ) -> dict:
        """(kept, changed, similarity, success, report, annotated [B,H,W,3]), and what the node shows of them.

        Raises ValueError for images of different sizes.
        """
        from ..training.evaluate.edit_report import edit_report

        result = edit_report(edited, source, instruction, mask, expected)
        return {
            "ui": shown(result.text, result.annotated),
            "result": (
                result.kept,
                result.changed,
                result.similarity,
                result.success,
                result.text,
                result.annotated,
            ),
        }


NODES = [DiptychEditScore]
