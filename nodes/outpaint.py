"""Outpainting nodes: room around an image, something in its hole, a crop of the hole, the way back."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..models.pixels import painted
from . import widgets
from .menus import NONE, lama_files, lama_path
from .widgets import Row, choice, integer, number, socket, switch, text

if TYPE_CHECKING:  # the rooms are imported where they are used: ComfyUI starts without them
    from ..models import outpaint

CATEGORY = "diptych/outpaint"
LAYOUT = "DIPTYCH_CANVAS_LAYOUT"
MOST = 16384  # pixels


def _side(name: str) -> Row:
    return number(0.0, -MOST, MOST, step=0.05, round=False)(
        f"How much to add on the {name}, in `unit`; below 0 crops."
    )


class DiptychOutpaintCanvas:
    """`models/outpaint.expand`."""

    DISPLAY_NAME = "Outpaint Canvas"
    DESCRIPTION = (
        "Gives an image room on any side, for whatever model paints it: the canvas, the mask of what is "
        "unknown, and the layout that takes the result back to exactly the size asked for. Takes batches, "
        "alpha and a mask of the image's own holes; amounts need not divide by anything."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE", "MASK", LAYOUT)
    RETURN_NAMES = ("canvas", "mask", "layout")
    OUTPUT_TOOLTIPS = (
        "The image with gray room around it: to Fill Hole, or straight to a conditioner.",
        "White where nothing is known: to the same nodes.",
        "Where everything is: to Paste Back.",
    )
    FUNCTION = "expand"
    SEARCH_ALIASES = ["outpaint", "pad image", "extend canvas", "expand image", "uncrop", "zoom out"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        from ..models.outpaint.amounts import UNITS
        from ..models.outpaint.canvas import GROUND

        return {
            "required": {
                "image": socket("IMAGE")("The image to enlarge, of any size."),
                "left": _side("left"),
                "top": _side("top"),
                "right": _side("right"),
                "bottom": _side("bottom"),
                "unit": choice(UNITS, "px")(
                    "px. cells: 8 px each. fraction: of the image's own side. aspect: the width / height to "
                    "reach, given to the sides that may grow. size: the width (left, right) or height (top, "
                    "bottom) to reach."
                ),
            },
            "optional": {
                "mask": socket("MASK")("What else to repaint inside the image (white); of the image's size."),
                "overlap": integer(0, 0, 1024)(
                    "Repaint so many px of the image's own edge too: a fresh seam is softer."
                ),
                "feather": integer(0, 0, 1024)(
                    "Fade the mask into the image over so many px. Models cut masks at 0.5; Paste Back uses "
                    "all of it."
                ),
                "multiple": integer(16, 1, 256, advanced=True)(
                    "Both sides become multiples of this, the rest outside what was asked for; Paste Back "
                    "cuts it off. FLUX wants 16, Stable Diffusion 8 (64 is best)."
                ),
                "ground": number(GROUND, 0.0, 1.0, step=0.01, advanced=True)(
                    "The gray of the new area. 0.5 is what models expect; 0 makes the `noise` fill equal to "
                    "webui's Outpainting mk2."
                ),
            },
        }

    def expand(
        self,
        image: Tensor,
        left: float,
        top: float,
        right: float,
        bottom: float,
        unit: str,
        mask: Tensor | None = None,
        overlap: int = 0,
        feather: int = 0,
        multiple: int = 16,
        ground: float = 0.5,
    ) -> tuple[Tensor, Tensor, outpaint.CanvasLayout]:
        """(canvas [B,h,w,3], mask [B,h,w], layout). Raises ValueError for what `outpaint.expand` refuses."""
        from ..models import outpaint

        sides = {"left": left, "top": top, "right": right, "bottom": bottom}
        more = {"overlap": overlap, "feather": feather, "multiple": multiple, "ground": ground}
        return outpaint.expand(image, **sides, unit=unit, mask=painted(mask, empty_items=True), **more)


class DiptychFillHole:
    """`models/outpaint.fill`."""

    DISPLAY_NAME = "Fill Hole"
    DESCRIPTION = (
        "Puts something into the masked part of an image before a model paints it: the image continued "
        "(edge, mirror, blur, mosaic), noise of its own colours (Outpainting mk2), plain colours, OpenCV's "
        "inpainting or LaMa. Known pixels stay exactly as they are."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("The image with its hole filled; at denoise below 1 the model starts from it.",)
    FUNCTION = "fill"
    SEARCH_ALIASES = [
        "fill masked area",
        "infill",
        "outpainting mk2",
        "matched noise",
        "lama",
        "telea",
        "prefill",
    ]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        from ..models import outpaint

        return {
            "required": {
                "image": socket("IMAGE")("The canvas, or any image with a hole."),
                "mask": socket("MASK")("White is filled; of the image's size. Gray mixes."),
                "how": choice(outpaint.FILLS, "blur")(
                    "neutral: gray. colour: the one below. edge, mirror, blur: the image goes on. noise: "
                    "mk2's. mosaic: tiles. mean, gaussian, perlin: its colours. telea, ns: OpenCV. lama: a "
                    "LaMa file."
                ),
            },
            "optional": {
                "colour": text("#00FF00")("For colour, written as #RRGGBB."),
                "fill_seed": widgets.seed()("For noise, gaussian and perlin."),
                "lama_file": choice(lama_files())(
                    "For lama: a file in models/inpaint or models/upscale_models (big-lama.pt)."
                ),
                "noise_q": number(1.0, 0.0, 4.0, step=0.05, advanced=True)(
                    "For noise: the exponent of the image's spectrum; 0 is rough, 2 smooth."
                ),
                "color_variation": number(0.05, 0.0, 1.0, step=0.01, advanced=True)(
                    "For noise: 0 starts from gray noise, 1 from independent channels."
                ),
                "cell": integer(64, 1, 4096, advanced=True)("For perlin: the largest features, in px."),
                "radius": integer(3, 1, 64, advanced=True)("For telea and ns: how far they look, in px."),
            },
        }

    def fill(
        self,
        image: Tensor,
        mask: Tensor,
        how: str,
        colour: str = "#00FF00",
        fill_seed: int = 0,
        lama_file: str = NONE,
        noise_q: float = 1.0,
        color_variation: float = 0.05,
        cell: int = 64,
        radius: int = 3,
    ) -> tuple[Tensor]:
        """The image [B,H,W,3] with its hole filled. Raises ValueError for what `outpaint.fill` refuses."""
        from ..models import outpaint

        given = {
            "colour": colour,
            "seed": fill_seed,
            "noise_q": noise_q,
            "color_variation": color_variation,
            "cell": cell,
            "radius": radius,
            "model": lama_path(lama_file) if how == "lama" else None,
        }
        takes = inspect.signature(outpaint.FILLS[how]).parameters
        options = {name: value for name, value in given.items() if name in takes}
        return (outpaint.fill(image, mask, how, **options),)


class DiptychContextCrop:
    """`models/outpaint.crop_context`."""

    DISPLAY_NAME = "Context Crop"
    DESCRIPTION = (
        "Cuts out a hole with its surroundings at the size a model works best at, so that a small repair in "
        "a large image gets all of the model's detail. Paste Back stitches the result in; outside the mask "
        "nothing changes, not by one bit."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE", "MASK", LAYOUT)
    RETURN_NAMES = ("crop", "mask", "layout")
    OUTPUT_TOOLTIPS = (
        "The surroundings of the hole: to a conditioner.",
        "The mask of the crop: to the same node.",
        "Where the crop was: to Paste Back.",
    )
    FUNCTION = "crop"
    SEARCH_ALIASES = ["crop and stitch", "inpaint crop", "only masked", "masked only", "detailer"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "image": socket("IMAGE")("The whole image."),
                "mask": socket("MASK")(
                    "White is repainted; of the image's size. A batch gives one crop each."
                ),
                "context": number(1.5, 1.0, 16.0, step=0.1)(
                    "How many times the hole's width and height the crop shows."
                ),
                "size": integer(1024, 0, 4096)(
                    "The crop becomes about size x size pixels at its own aspect: 1024 for FLUX, 512 for SD "
                    "1.5. 0 keeps the image's scale."
                ),
            },
            "optional": {
                "blend": integer(8, 0, 512)(
                    "Fade from image to result over so many px inside the mask, in Paste Back."
                ),
                "fill_holes": switch(False)("Repaint known islands inside the mask as well."),
                "highpass": number(0.1, 0.0, 1.0, step=0.01, advanced=True)(
                    "Mask values below this count as black: faint specks make no large crop."
                ),
                "multiple": integer(16, 1, 256, advanced=True)(
                    "Both sides of the crop become multiples of this."
                ),
            },
        }

    def crop(
        self,
        image: Tensor,
        mask: Tensor,
        context: float,
        size: int,
        blend: int = 8,
        fill_holes: bool = False,
        highpass: float = 0.1,
        multiple: int = 16,
    ) -> tuple[Tensor, Tensor, outpaint.CanvasLayout]:
        """(crop [B,h,w,3], mask [B,h,w], layout). Raises ValueError for what `crop_context` refuses."""
        from ..models import outpaint

        more = {"blend": blend, "fill_holes": fill_holes, "highpass": highpass, "multiple": multiple}
        return outpaint.crop_context(image, mask, context=context, size=size, **more)


class DiptychPasteBack:
    """`models/outpaint.paste_back`."""

    DISPLAY_NAME = "Paste Back"
    DESCRIPTION = (
        "Puts what a model painted on a canvas or a context crop into the image: at the size asked for, "
        "every known pixel exactly as it was, and the colours of the new part moved to meet the old ones, "
        "so that no step shows at the seam."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("The finished image, with the original's alpha if it had any.",)
    FUNCTION = "paste"
    SEARCH_ALIASES = [
        "stitch",
        "inpaint stitch",
        "composite",
        "uncrop",
        "seam",
        "colour match",
        "color match",
    ]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "image": socket("IMAGE")("The decoded result; it may have been upscaled."),
                "original": socket("IMAGE")("The image that Outpaint Canvas or Context Crop got."),
                "layout": socket(LAYOUT)("From Outpaint Canvas or Context Crop."),
            },
            "optional": {
                "mask": socket("MASK")(
                    "Take the result only here; of the finished image's, the canvas' or the original's size. "
                    "Open or empty: the mask that the layout came with."
                ),
                "feather": integer(0, 0, 512)(
                    "Fade the result out over so many px of known image around the mask."
                ),
                "match_colour": switch(True)(
                    "Correct the result's colours by how it differs from the original around the mask. Off: "
                    "the model's own colours."
                ),
                "join": switch(False, advanced=True)(
                    "On: all results of a batch go into one image, in order. Off: one image each."
                ),
            },
        }

    def paste(
        self,
        image: Tensor,
        original: Tensor,
        layout: outpaint.CanvasLayout,
        mask: Tensor | None = None,
        feather: int = 0,
        match_colour: bool = True,
        join: bool = False,
    ) -> tuple[Tensor]:
        """The finished image [B,H,W,C]. Raises ValueError for what `paste_back` refuses."""
        from ..models import outpaint

        more = {"feather": feather, "match_colour": match_colour, "join": join}
        return (outpaint.paste_back(image, original, layout, painted(mask, empty_items=True), **more),)


class DiptychTiledSampler:
    """`samplers/comfy_tiles.py` around another SAMPLER."""

    DISPLAY_NAME = "Tiled Sampler"
    DESCRIPTION = (
        "Runs any sampler window by window over a canvas of any size: each window sees what is known by "
        "then, from the image outwards. Works with every model that paints images; masks, masked "
        "images and references are cut along. Memory is that of one window."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("sampler",)
    OUTPUT_TOOLTIPS = ("To SamplerCustomAdvanced or SamplerCustom.",)
    FUNCTION = "build"
    SEARCH_ALIASES = ["tiled diffusion", "panorama", "infinite canvas", "large canvas", "glid", "tiles"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        from ..samplers import tiles

        return {
            "required": {
                "sampler": socket("SAMPLER")("What samples each window."),
                "window": integer(512, 16, MOST, step=16)(
                    "Side of a window in px: what the model works best at (SD 1.5: 512, FLUX: 1024). At most "
                    "the canvas."
                ),
                "stride": integer(256, 16, MOST, step=16)(
                    "From one window to the next, in px; half a window is usual."
                ),
            },
            "optional": {
                "mask": socket("MASK")(
                    "White is unknown. Open or empty: the latent's noise mask, else the mask in the "
                    "conditioning (Fill and inpainting models), else the whole canvas."
                ),
                "order": choice(tiles.ORDERS, tiles.ORDERS[0])(
                    "outward: always the window that knows most. glid: row by row, as glid-3-xl-stable does."
                ),
                "blend": integer(32, 0, 1024, step=8)(
                    "Fade over so many px into what earlier windows painted."
                ),
                "known": choice(tiles.KNOWN, tiles.KNOWN[0], advanced=True)(
                    "keep: latents that are known stay. overwrite: each window is taken whole, as glid does."
                ),
            },
        }

    def build(
        self,
        sampler: Any,
        window: int,
        stride: int,
        mask: Tensor | None = None,
        order: str = "outward",
        blend: int = 32,
        known: str = "keep",
    ) -> tuple[Any]:
        """The SAMPLER; mask [B,H,W] in pixels. Raises ValueError for a stride above the window."""
        from ..samplers.comfy_tiles import TiledSampler

        if stride > window:
            raise ValueError(f"stride is {stride} and window is {window} px: at most the window.")
        sizes = {"window": window, "stride": stride, "blend": blend}
        return (
            TiledSampler(sampler, **sizes, order=order, known=known, mask=painted(mask, empty_items=True)),
        )


NODES = [DiptychOutpaintCanvas, DiptychFillHole, DiptychContextCrop, DiptychPasteBack, DiptychTiledSampler]
