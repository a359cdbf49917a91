"""Whole methods of outpainting as one node each, and the canvas that never ends."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import widgets
from .widgets import Row, automatic, choice, integer, number, socket, switch

CATEGORY = "diptych/outpaint"
MOST = 16384  # pixels
SCHEDULERS = ("auto", "simple", "normal", "karras", "exponential", "sgm_uniform", "ddim_uniform", "beta")
OWN = -1  # mask_blur: the method's own


def _details() -> dict[str, Row]:
    """The widgets that are seldom needed."""
    return {
        "scheduler": choice(SCHEDULERS, "auto", advanced=True)(
            "auto: FLUX's, with the shift of the real size; for Stable Diffusion evenly spaced steps."
        ),
        "mask_blur": automatic("INT", OWN, OWN, 64, advanced=True)(
            "For mk2 and poor man, in px. auto: their own, 8 and 4. Less for small images."
        ),
        "overlap": integer(0, 0, 1024, advanced=True)(
            "For direct and tiles: so many px of the image's own edge are repainted too."
        ),
        "feather": integer(0, 0, 1024, advanced=True)(
            "For direct, tiles and mosaic: fade the result out over so many px of known image."
        ),
        "noise_q": number(1.0, 0.0, 4.0, step=0.05, advanced=True)("For mk2's noise: 0 is rough, 2 smooth."),
        "color_variation": number(0.05, 0.0, 1.0, step=0.01, advanced=True)(
            "For mk2's noise: 0 starts from gray noise, 1 from independent channels."
        ),
    }


class DiptychOutpaint:
    """`models/outpaint.outpaint` around `models/comfy_repaint.py`."""

    DISPLAY_NAME = "Outpaint"
    DESCRIPTION = (
        "Enlarges an image in one node: canvas, fill, sampling and paste-back. At once, by windows, or as "
        "webui's Outpainting mk2, Poor man's outpainting and Mosaic outpaint do. With FLUX Fill, inpainting "
        "models, glid and plain models; known pixels come back exactly."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("The enlarged image, with the original's alpha if it had any.",)
    FUNCTION = "outpaint"
    SEARCH_ALIASES = ["outpainting mk2", "poor man's outpainting", "mosaic outpaint", "uncrop", "zoom out"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        from ..models import outpaint

        sides = {
            side: integer(0, -MOST, MOST, step=8)(f"How many px to add on the {side}; below 0 crops.")
            for side in ("left", "top", "right", "bottom")
        }
        fills = [how for how in outpaint.FILLS if how != "lama"]
        return {
            "required": {
                "model": socket("MODEL")("What paints: FLUX Fill, an inpainting model, glid, or any other."),
                "positive": socket("CONDITIONING")(
                    "What the whole finished image shows. FLUX Fill wants a guidance of 30: Flux Guidance."
                ),
                "negative": socket("CONDITIONING")("The negative prompt; without effect at cfg 1."),
                "vae": socket("VAE")("The model's autoencoder."),
                "image": socket("IMAGE")("The image to enlarge, of any size."),
                **sides,
                "method": choice(outpaint.METHODS, "direct")(
                    "direct: the canvas at once. tiles: window by window, outwards. mk2: matched noise, side "
                    "after side. poor man: overlapping tiles. mosaic: over tiles of the mirror image. The "
                    "manual says which for what."
                ),
                "seed": widgets.seed()("Of the noise; later windows count on from it."),
                "steps": integer(20, 1, 1000)("For every window. mk2's authors advise 80 to 100."),
                "cfg": number(1.0, 0.0, 100.0, step=0.1, round=0.01)(
                    "The prompt against the negative one: 1 for FLUX, about 7 for Stable Diffusion."
                ),
                "denoise": number(1.0, 0.01, 1.0, step=0.01)(
                    "Below 1 the model starts from the fill: 0.8 for mk2, 0.9 for mosaic, 1 for FLUX Fill."
                ),
            },
            "optional": {
                "sampler": socket("SAMPLER")("What samples; open: euler."),
                "fill": choice(["auto", *fills], "auto")(
                    "What stands in the hole first. auto: edge, for poor man blur; mk2 and mosaic have their "
                    "own."
                ),
                "window": integer(512, 16, MOST, step=16)(
                    "For tiles, mk2 and poor man: what the model works best at. SD 1.5: 512, FLUX: 1024."
                ),
                "match_colour": switch(True)(
                    "For direct and tiles: correct the new part's colours at the seam."
                ),
                **_details(),
            },
        }

    def outpaint(
        self,
        model: Any,
        positive: list,
        negative: list,
        vae: Any,
        image: Tensor,
        left: int,
        top: int,
        right: int,
        bottom: int,
        method: str,
        seed: int,
        steps: int,
        cfg: float,
        denoise: float,
        sampler: Any = None,
        fill: str = "auto",
        window: int = 512,
        match_colour: bool = True,
        scheduler: str = "auto",
        mask_blur: int = OWN,
        overlap: int = 0,
        feather: int = 0,
        noise_q: float = 1.0,
        color_variation: float = 0.05,
    ) -> tuple[Tensor]:
        """The enlarged image [B,h,w,C]. Raises ValueError for what `outpaint.outpaint` refuses."""
        import comfy.samplers

        from ..models import outpaint
        from ..models.comfy_repaint import Repainter

        sides = {"left": left, "right": right, "top": top, "bottom": bottom}
        how = outpaint.Options(
            window=window,
            fill=fill,
            mask_blur=None if mask_blur == OWN else mask_blur,
            overlap=overlap,
            feather=feather,
            match_colour=match_colour,
            seed=seed,
            noise_q=noise_q,
            color_variation=color_variation,
        )
        sampler = sampler or comfy.samplers.sampler_object("euler")
        paint = Repainter(model, positive, negative, vae, sampler, scheduler, seed, steps, cfg, denoise)
        return (outpaint.outpaint(paint, image, sides, method, how),)


NODES = [DiptychOutpaint]
