"""Mask Packer: a mask as FLUX.1-Fill receives it, to look at and to pass on."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from ..models import geometry, packing, pixels
from . import widgets
from .shown import saved
from .widgets import integer, socket, switch


class DiptychMaskPacker:
    """`models/packing.pack_mask`, and the mask's way there."""

    DISPLAY_NAME = "Mask Packer (Flux Fill)"
    DESCRIPTION = (
        "Turns a mask into the 256 channels per token that FLUX.1-Fill reads, and shows them: "
        "hover over a token to see its 16 x 16 pixels and 256 values. Grow, feather, binarise or invert the "
        "mask on the way. Equal to diffusers' FluxFillPipeline bit for bit."
    )
    CATEGORY = "diptych"
    RETURN_TYPES = ("DIPTYCH_MASK_TOKENS", "MASK", "IMAGE")
    RETURN_NAMES = ("mask_tokens", "mask", "preview")
    OUTPUT_TOOLTIPS = (
        "[batch, tokens, 256]: to the Flux Fill Conditioner, which then uses them as they are.",
        "The mask as the model will see it: resized to multiples of 16, grown, hard or soft.",
        "The 256 channels as a mosaic of 16 by 16 tiles; each tile has one pixel per token.",
    )
    FUNCTION = "pack"
    SEARCH_ALIASES = ["pixel unshuffle mask", "fill mask", "mask tokens", "grow mask", "binarize mask"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {"mask": socket("MASK")("White (1) is repainted. Any size; a batch is kept.")},
            "optional": {
                "image": socket("IMAGE")(
                    "The image the mask belongs to: the mask takes its size (multiples of 16)."
                ),
                "grow": integer(0, -512, 512)(
                    "Enlarge by a disc of exactly so many pixels; below 0 shrinks."
                ),
                "binarise": switch(True)(
                    "On: 1 from 0.5 up, else 0, as FLUX.1-Fill was trained. Off: gray values reach the model."
                ),
                "feather": integer(0, 0, 512)(
                    "Width in pixels of a soft edge, 0.5 at the edge itself. It only shows with binarise off."
                ),
                "invert": switch(False)("Swap repaint and keep, before anything else."),
                "policy": widgets.policy(advanced=True)(
                    "How sides that do not divide by 16 are made to; use the same as in the Flux Fill "
                    "Conditioner."
                ),
            },
        }

    def pack(
        self,
        mask: Tensor,
        image: Tensor | None = None,
        grow: int = 0,
        binarise: bool = True,
        feather: int = 0,
        invert: bool = False,
        policy: str = "stretch",
    ) -> dict:
        """(tokens [B,S,256], the mask [B,h,w] as packed, preview [B,h,w,3]) of a mask [B,H,W].

        The node shows the mask under `web/js/mask.js`, which tells the 256 values of the token hovered over.
        """
        seen = pixels.as_mask(mask)
        if image is not None:
            seen = pixels.resize_mask(seen, *pixels.as_image(image).shape[1:3])
        size = tuple(seen.shape[1:])
        fit = geometry.check_panel(size, geometry.keep_scale(size, policy, masked=True))
        seen = pixels.fit_mask(1 - seen if invert else seen, fit)
        if grow or feather or binarise:
            seen = pixels.grow(pixels.binarise(seen), grow)
        if feather:
            seen = pixels.soft_edge(seen, feather)
        if feather and binarise:
            seen = pixels.binarise(seen)
        tokens = packing.pack_mask(seen)
        ui = {"diptych_masks": saved(seen[..., None].expand(-1, -1, -1, 3))}
        return {"ui": ui, "result": (tokens, seen, _mosaic(tokens, *seen.shape[1:]))}


def _mosaic(tokens: Tensor, height: int, width: int) -> Tensor:
    """Mask tokens of a height x width mask -> IMAGE [B,height,width,3]: channel 16 r + c is tile (r, c)."""
    tiles = rearrange(tokens, "b (h w) (r c) -> b (r h) (c w)", h=height // 16, w=width // 16, r=16, c=16)
    return tiles[..., None].expand(-1, -1, -1, 3).contiguous()


NODES = [DiptychMaskPacker]
