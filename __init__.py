"""ComfyUI-Diptych: instruction image editing with FLUX Fill and Kontext, and reward training for it.

The repository root is both a ComfyUI custom-node folder and the Python package `comfyui_diptych`.
Importing it is cheap on purpose: diffusers, transformers, peft and accelerate load when first used.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__version__ = "0.1.0"

WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "__version__"]
