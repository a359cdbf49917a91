"""glid-3-xl-stable: all that is known of it in this pack stands in this room.

It is Stable Diffusion 1.x with eight input channels: the second four are the latents of what is known, and
unknown cells are exact zeros; there is no mask channel. In glid a mask is white where pixels are *kept*;
everywhere else in the pack white is repainted. `model.py` and `paint.py` are the shell's half, `comfy.py` is
ComfyUI's, `files.py` reads its `.pt` files; the samplers are `samplers/plms.py`.
"""

from .geometry import (
    AMOUNT,
    DIRECTIONS,
    SCALE,
    WHITE,
    Sides,
    glid_canvas,
    guided,
    image_embed,
    known_from_mask,
    known_latents,
    sides,
)

__all__ = [
    "AMOUNT",
    "DIRECTIONS",
    "SCALE",
    "WHITE",
    "Sides",
    "glid_canvas",
    "guided",
    "image_embed",
    "known_from_mask",
    "known_latents",
    "sides",
]
