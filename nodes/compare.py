"""Before and After: two images under one slider."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from .shown import saved, shown
from .widgets import socket


def slider_known() -> bool:
    """Whether the running ComfyUI has core's IMAGECOMPARE widget: it came with core's node of that name."""
    return "ImageCompare" in getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})


class DiptychCompare:
    """Core's IMAGECOMPARE widget, which `web/js/compare.js` fills; `models/compare.py` without it."""

    DISPLAY_NAME = "Before and After"
    DESCRIPTION = (
        "Lays two images over each other with a slider between them: move the mouse over the node to see "
        "what an edit changed. Where ComfyUI's page has no such slider, both stand side by side."
    )
    CATEGORY = "diptych"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("side_by_side",)
    OUTPUT_TOOLTIPS = ("Both in one image, before on the left; to save it or to show it anywhere.",)
    FUNCTION = "compare"
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["compare images", "image comparer", "slider", "difference", "before after", "ab test"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        rows = {
            "required": {
                "before": socket("IMAGE")("The source. One image serves a whole batch of edits."),
                "after": socket("IMAGE")("The edit, from Diptych Split or VAE Decode."),
            }
        }
        if slider_known():
            rows["optional"] = {"compare_view": socket("IMAGECOMPARE")("The slider itself; takes no link.")}
        return rows

    def compare(self, before: Tensor, after: Tensor, compare_view: Any | None = None) -> dict:
        """(side by side [N,h,w,3],), and what the node shows: both batches, or that image without a slider.

        Raises ValueError for batches of different lengths.
        """
        from ..models.compare import side_by_side

        both = side_by_side(before, after)
        if not slider_known():
            return {"ui": shown(None, both), "result": (both,)}
        return {"ui": {"a_images": saved(before), "b_images": saved(after)}, "result": (both,)}


NODES = [DiptychCompare]
