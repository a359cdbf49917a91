"""Outpainting nodes: room around an image, something in its hole, a crop of the hole, the way back."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..models.pixels import as_mask

if TYPE_CHECKING:  # the rooms are imported where they are used: ComfyUI starts without them
    from ..models import outpaint

CATEGORY = "diptych/outpaint"
LAYOUT = "DIPTYCH_CANVAS_LAYOUT"
MOST = 16384  # pixels
LAMA_FOLDERS = ("inpaint", "upscale_models")
WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors")
NONE = "none"


def _given(mask: Tensor | None) -> Tensor | None:
    """The mask, or None if nothing at all is painted: what Load Image gives for an image without alpha."""
    return mask if mask is not None and bool(as_mask(mask).any()) else None


def _side(name: str) -> tuple:
    words = f"How much to add on the {name}, in `unit`; below 0 crops."
    return (
        "FLOAT",
        {"default": 0.0, "min": -MOST, "max": MOST, "step": 0.05, "round": False, "tooltip": words},
    )


def _whole(default: int, words: str, *, most: int = MOST, least: int = 0, **more: Any) -> tuple:
    return ("INT", {"default": default, "min": least, "max": most, "tooltip": words, **more})


class DiptychOutpaintCanvas:
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
        from ..models.outpaint.amounts import UNITS
        from ..models.outpaint.canvas import GROUND

        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The image to enlarge, of any size."}),
                "left": _side("left"),
                "top": _side("top"),
                "right": _side("right"),
                "bottom": _side("bottom"),
                "unit": (
                    list(UNITS),
                    {
                        "default": "px",
                        "tooltip": "px. cells: 8 px each. fraction: of the image's own side. aspect: the "
                        "width / height to reach, given to the sides that may grow. size: the width (left, "
                        "right) or height (top, bottom) to reach.",
                    },
                ),
            },
            "optional": {
                "mask": (
                    "MASK",
                    {"tooltip": "What else to repaint inside the image (white); of the image's size."},
                ),
                "overlap": _whole(
                    0, "Repaint so many px of the image's own edge too: a fresh seam is softer.", most=1024
                ),
                "feather": _whole(
                    0,
                    "Fade the mask into the image over so many px. Models cut masks at 0.5; Paste Back "
                    "uses all of it.",
                    most=1024,
                ),
                "multiple": _whole(
                    16,
                    "Both sides become multiples of this, the rest outside what was asked for; Paste Back "
                    "cuts it off. FLUX wants 16, Stable Diffusion 8 (64 is best).",
                    most=256,
                    least=1,
                    advanced=True,
                ),
                "ground": (
                    "FLOAT",
                    {
                        "default": GROUND,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "The gray of the new area. 0.5 is what models expect; 0 makes the `noise` "
                        "fill equal to webui's Outpainting mk2.",
                    },
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
        from ..models import outpaint

        sides = {"left": left, "top": top, "right": right, "bottom": bottom}
        more = {"overlap": overlap, "feather": feather, "multiple": multiple, "ground": ground}
        return outpaint.expand(image, **sides, unit=unit, mask=_given(mask), **more)


class DiptychFillHole:
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
        from ..models import outpaint

        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The canvas, or any image with a hole."}),
                "mask": ("MASK", {"tooltip": "White is filled; of the image's size. Gray mixes."}),
                "how": (
                    list(outpaint.FILLS),
                    {
                        "default": "blur",
                        "tooltip": "neutral: gray. colour: the one below. edge, mirror, blur: the image "
                        "goes on. noise: mk2's. mosaic: tiles. mean, gaussian, perlin: its colours. telea, "
                        "ns: OpenCV. lama: a LaMa file.",
                    },
                ),
            },
            "optional": {
                "colour": ("STRING", {"default": "#00FF00", "tooltip": "For colour, written as #RRGGBB."}),
                "fill_seed": _whole(0, "For noise, gaussian and perlin.", most=0xFFFFFFFFFFFFFFFF),
                "lama_file": (
                    lama_files(),
                    {"tooltip": "For lama: a file in models/inpaint or models/upscale_models (big-lama.pt)."},
                ),
                "noise_q": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 4.0,
                        "step": 0.05,
                        "advanced": True,
                        "tooltip": "For noise: the exponent of the image's spectrum; 0 is rough, 2 smooth.",
                    },
                ),
                "color_variation": (
                    "FLOAT",
                    {
                        "default": 0.05,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "For noise: 0 starts from gray noise, 1 from independent channels.",
                    },
                ),
                "cell": _whole(
                    64, "For perlin: the largest features, in px.", most=4096, least=1, advanced=True
                ),
                "radius": _whole(
                    3, "For telea and ns: how far they look, in px.", most=64, least=1, advanced=True
                ),
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


def _lama_choices() -> dict[str, Path]:
    """{name: file} over ComfyUI's folders; models/inpaint is looked through even if no pack registered it."""
    try:
        import folder_paths
    except ImportError:
        return {}
    found = {}
    for folder in LAMA_FOLDERS:
        known = folder in folder_paths.folder_names_and_paths
        places = folder_paths.get_folder_paths(folder) if known else [Path(folder_paths.models_dir) / folder]
        for place in map(Path, places):
            for file in sorted(place.rglob("*")) if place.is_dir() else ():
                if file.suffix.lower() in WEIGHTS and file.is_file():
                    found.setdefault(f"{folder}/{file.relative_to(place).as_posix()}", file)
    return found


def lama_files() -> list[str]:
    """What `lama_file` offers; "none" first, so that the node is valid without a file."""
    return [NONE, *_lama_choices()]


def lama_path(name: str) -> Path | None:
    """The file of that name; None for "none". Raises ValueError for a name that is not in the list."""
    if name == NONE:
        return None
    choices = _lama_choices()
    if name not in choices:
        raise ValueError(f"lama_file is {name!r}: it is not in {' or '.join(LAMA_FOLDERS)}, choose again.")
    return choices[name]


class DiptychContextCrop:
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
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The whole image."}),
                "mask": (
                    "MASK",
                    {"tooltip": "White is repainted; of the image's size. A batch gives one crop each."},
                ),
                "context": (
                    "FLOAT",
                    {
                        "default": 1.5,
                        "min": 1.0,
                        "max": 16.0,
                        "step": 0.1,
                        "tooltip": "How many times the hole's width and height the crop shows.",
                    },
                ),
                "size": _whole(
                    1024,
                    "The crop becomes about size x size pixels at its own aspect: 1024 for FLUX, 512 for SD "
                    "1.5. 0 keeps the image's scale.",
                    most=4096,
                ),
            },
            "optional": {
                "blend": _whole(
                    8, "Fade from image to result over so many px inside the mask, in Paste Back.", most=512
                ),
                "fill_holes": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Repaint known islands inside the mask as well."},
                ),
                "highpass": (
                    "FLOAT",
                    {
                        "default": 0.1,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "advanced": True,
                        "tooltip": "Mask values below this count as black: faint specks make no large crop.",
                    },
                ),
                "multiple": _whole(
                    16, "Both sides of the crop become multiples of this.", most=256, least=1, advanced=True
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
        from ..models import outpaint

        more = {"blend": blend, "fill_holes": fill_holes, "highpass": highpass, "multiple": multiple}
        return outpaint.crop_context(image, mask, context=context, size=size, **more)


class DiptychPasteBack:
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
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The decoded result; it may have been upscaled."}),
                "original": ("IMAGE", {"tooltip": "The image that Outpaint Canvas or Context Crop got."}),
                "layout": (LAYOUT, {"tooltip": "From Outpaint Canvas or Context Crop."}),
            },
            "optional": {
                "mask": (
                    "MASK",
                    {
                        "tooltip": "Take the result only here; of the finished image's, the canvas' or the "
                        "original's size. Open or empty: the mask that the layout came with."
                    },
                ),
                "feather": _whole(
                    0, "Fade the result out over so many px of known image around the mask.", most=512
                ),
                "match_colour": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Correct the result's colours by how it differs from the original around "
                        "the mask. Off: the model's own colours.",
                    },
                ),
                "join": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "advanced": True,
                        "tooltip": "On: all results of a batch go into one image, in order. Off: one "
                        "image each.",
                    },
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
        from ..models import outpaint

        more = {"feather": feather, "match_colour": match_colour, "join": join}
        return (outpaint.paste_back(image, original, layout, _given(mask), **more),)


class DiptychTiledSampler:
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
        from ..samplers import tiles

        return {
            "required": {
                "sampler": ("SAMPLER", {"tooltip": "What samples each window."}),
                "window": _whole(
                    512,
                    "Side of a window in px: what the model works best at (SD 1.5: 512, FLUX: 1024). At most "
                    "the canvas.",
                    least=16,
                    step=16,
                ),
                "stride": _whole(
                    256, "From one window to the next, in px; half a window is usual.", least=16, step=16
                ),
            },
            "optional": {
                "mask": (
                    "MASK",
                    {
                        "tooltip": "White is unknown. Open or empty: the latent's noise mask, else the mask "
                        "in the conditioning (Fill and inpainting models), else the whole canvas."
                    },
                ),
                "order": (
                    list(tiles.ORDERS),
                    {
                        "default": tiles.ORDERS[0],
                        "tooltip": "outward: always the window that knows most. glid: row by row, as "
                        "glid-3-xl-stable does.",
                    },
                ),
                "blend": _whole(
                    32, "Fade over so many px into what earlier windows painted.", most=1024, step=8
                ),
                "known": (
                    list(tiles.KNOWN),
                    {
                        "default": tiles.KNOWN[0],
                        "advanced": True,
                        "tooltip": "keep: latents that are known stay. overwrite: each window is taken "
                        "whole, as glid does.",
                    },
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
        from ..samplers.comfy_tiles import TiledSampler

        if stride > window:
            raise ValueError(f"stride is {stride} and window is {window} px: at most the window.")
        sizes = {"window": window, "stride": stride, "blend": blend}
        return (TiledSampler(sampler, **sizes, order=order, known=known, mask=_given(mask)),)


NODES = [DiptychOutpaintCanvas, DiptychFillHole, DiptychContextCrop, DiptychPasteBack, DiptychTiledSampler]
