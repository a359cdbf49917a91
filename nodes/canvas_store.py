"""The canvas that never ends, as a node: files below ComfyUI's output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.pixels import painted
from .menus import comfy_folders
from .widgets import choice, integer, socket, text

ACTIONS = ("read", "write", "export")
FOLDER = "diptych_canvas"
FAR = 2**24


class DiptychCanvasStore:
    """`models/outpaint/store.py`."""

    DISPLAY_NAME = "Canvas Store"
    DESCRIPTION = (
        "A canvas without an edge, kept in files below the output folder: read a region, paint it, write it "
        "back, at any coordinates. It survives restarts and interrupted runs, and known pixels come back "
        "exactly. For infinite canvases and infinite zoom."
    )
    CATEGORY = "diptych/outpaint"
    RETURN_TYPES = ("STRING", "IMAGE", "MASK", "INT", "INT", "INT", "INT")
    RETURN_NAMES = ("canvas", "image", "mask", "x", "y", "width", "height")
    OUTPUT_TOOLTIPS = (
        "The name again: to the next Canvas Store, which then comes after this one.",
        "The region as it is now; gray where nothing is known.",
        "White where nothing is known: to Fill Hole and to a conditioner.",
        "The region's left edge.",
        "The region's top edge.",
        "The region's width.",
        "The region's height.",
    )
    FUNCTION = "run"
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["infinite canvas", "infinite zoom", "stablediffusion-infinity", "openoutpaint"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        from ..models.outpaint.store import OVER

        return {
            "required": {
                "canvas": text("canvas")(f"The canvas' name: its folder is output/{FOLDER}/NAME."),
                "action": choice(ACTIONS, "read")(
                    "read: the region below. write: the image at x, y. export: everything that is known."
                ),
                "x": integer(0, -FAR, FAR)("Left edge of the region in px; may be negative."),
                "y": integer(0, -FAR, FAR)("Top edge of the region in px; may be negative."),
                "width": integer(512, 1, 16384)("For read: width of the region. A write has the image's."),
                "height": integer(512, 1, 16384)("For read: height of the region. A write has the image's."),
                "over": choice(OVER, "all")(
                    "For write. all: replaces what is there. unknown: known pixels stay. start over: the "
                    "canvas is emptied first, to begin with an image."
                ),
            },
            "optional": {
                "image": socket("IMAGE")("For write: one image; transparent pixels stay unknown."),
                "mask": socket("MASK")(
                    "For write: only what is white is written; of the image's size. Open or empty: all of it."
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, canvas: Any = None, **_: Any) -> str:
        """The canvas as its state file describes it: another text once its content is another."""
        from ..models.outpaint.store import STATE

        try:
            return (_folder(canvas) / STATE).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""

    def run(
        self,
        canvas: str,
        action: str,
        x: int,
        y: int,
        width: int,
        height: int,
        over: str = "all",
        image: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[str, Tensor, Tensor, int, int, int, int]:
        """(name, image [1,h,w,3], mask [1,h,w], region). Raises ValueError for what `CanvasStore` refuses."""
        from ..models.outpaint.store import CanvasStore, Region

        store, region = CanvasStore(_folder(canvas)), Region(x, y, width, height)
        if action == "export":
            return (canvas, *_flat(*store.export()))
        if action == "write":
            if image is None:
                raise ValueError("image is missing: a write puts an image on the canvas, connect one.")
            region = store.write(image, x, y, painted(mask), over)
        return (canvas, *_flat(*store.read(region), region))


def _flat(image: Tensor, mask: Tensor, region: Any) -> tuple:
    return (image, mask, *region)


def _folder(canvas: Any) -> Path:
    """Where a canvas lies. Raises ValueError for a name that is no plain file name."""
    from ..training.runtime.disk import check_name

    if not isinstance(canvas, str):
        raise ValueError(f"canvas is {canvas!r}: give it a name.")
    folders = comfy_folders()
    top = Path(folders.get_output_directory()) if folders else Path("output")
    return top / FOLDER / check_name(canvas, "canvas")


NODES = [DiptychCanvasStore]
