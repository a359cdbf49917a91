"""Text to image and image to text: a small multimodal latent-diffusion system.

Two encoders put images and texts into one space; an autoregressive decoder writes captions, because a text
is a sequence of tokens; a diffusion model conditioned on the text draws the latent that the image decoder
turns into an image, because an image is continuous and two-dimensional. Not for FLUX or Stable Diffusion.
Importing it loads neither diffusers nor transformers: their blocks are fetched where a module is built.
"""

from __future__ import annotations

from .images import ImageDecoder, ImageEncoder
from .latent_diffusion import LatentDiffusionUNet
from .losses import Losses, caption_loss, contrastive_loss, diffusion_loss, foreground, reconstruction_loss
from .model import GenerativeMultimodalModel
from .pairs import Pairs
from .presets import PRESETS, Architecture
from .text import TextDecoder, TextEncoder
from .tokens import word_tokenizer
from .unet import ConditionalUNet2D

__all__ = [
    "PRESETS",
    "Architecture",
    "ConditionalUNet2D",
    "GenerativeMultimodalModel",
    "ImageDecoder",
    "ImageEncoder",
    "LatentDiffusionUNet",
    "Losses",
    "Pairs",
    "TextDecoder",
    "TextEncoder",
    "caption_loss",
    "contrastive_loss",
    "diffusion_loss",
    "foreground",
    "reconstruction_loss",
    "word_tokenizer",
]
