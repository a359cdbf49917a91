"""FLUX.1's files through ComfyUI's own loader nodes, by the names in its folders' lists.

Imported only at run time, from a node: the loaders are those of the running ComfyUI, patched or not.
"""

from __future__ import annotations

from typing import Any

import nodes


def load_flux_model(file: str, weight_dtype: str) -> Any:
    """MODEL of a file in models/diffusion_models; weight_dtype as *Load Diffusion Model* has it."""
    return _result("UNETLoader", "load_unet", unet_name=file, weight_dtype=weight_dtype)


def load_flux_text(clip_l: str, t5: str) -> Any:
    """CLIP of two files in models/text_encoders."""
    return _result("DualCLIPLoader", "load_clip", clip_name1=clip_l, clip_name2=t5, type="flux")


def load_flux_vae(file: str) -> Any:
    """VAE of a file in models/vae."""
    return _result("VAELoader", "load_vae", vae_name=file)


def _result(node: str, function: str, **inputs: str) -> Any:
    return getattr(nodes.NODE_CLASS_MAPPINGS[node](), function)(**inputs)[0]
