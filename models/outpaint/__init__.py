"""Outpainting as geometry: an outpaint is a canvas with a hole, whatever model paints it.

`expand` makes the canvas, `fill` prepares the hole, `crop_context` cuts out what a model need see, and
`paste_back` returns every known pixel. Images are [B,H,W,3], masks [B,H,W] with 1 = unknown. Sampling happens
elsewhere; which cells are sampled in which order is `samplers/tiles.py`.
"""

from ..glid import glid_canvas
from .canvas import CanvasLayout, expand
from .crop import crop_context
from .fills import FILLS, LATENT_FILLS, fill
from .methods import AUTO, METHODS, Options, Paint, Piece, outpaint
from .paste import paste_back

__all__ = [
    "AUTO",
    "FILLS",
    "LATENT_FILLS",
    "METHODS",
    "CanvasLayout",
    "Options",
    "Paint",
    "Piece",
    "crop_context",
    "expand",
    "fill",
    "glid_canvas",
    "outpaint",
    "paste_back",
]
