"""MODEL, LATENT and CONDITIONING of ComfyUI as a walk. Imported only at run time, from a node."""

from __future__ import annotations

from typing import Any

from . import flux_shapes, unet_shapes
from .shapes import Call, Walk, weights


def walk(model: Any, latent: dict, conditioning: list) -> Walk:
    """One call of `model` for these latents and the first entry of this conditioning.

    Raises ValueError for another kind of model, an empty conditioning, latents or text that do not fit.
    """
    base = model.model
    network = base.diffusion_model
    shapes = weights(dict(network.named_parameters()))
    if not (flux_shapes.is_flux(shapes) or unet_shapes.is_unet(shapes)):
        raise ValueError(
            f"model is a {type(network).__name__}: FLUX transformers and Stable Diffusion UNets can be shown."
        )
    call, told = _call(model, latent, conditioning)
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    if flux_shapes.is_flux(shapes):
        return flux_shapes.walk(shapes, call, size, told)
    heads = {n: m.heads for n, m in network.named_modules() if n.endswith("attn1") and hasattr(m, "heads")}
    return unet_shapes.walk(shapes, call, size, heads, told)


def _call(model: Any, latent: dict, conditioning: list) -> tuple[Call, str]:
    import comfy.sample

    if not conditioning:
        raise ValueError("conditioning is empty: connect an encoded prompt.")
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    channels = model.model.latent_format.latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"latent has shape {list(samples.shape)}, but this model takes "
            f"[batch, {channels}, height, width]: encode the image with the model's own VAE."
        )
    text, values = conditioning[0][0], conditioning[0][1]
    references = tuple(tuple(r.shape[-2:]) for r in values.get("reference_latents") or ())
    params = getattr(model.model.diffusion_model, "params", None)
    method = values.get("reference_latents_method") or getattr(params, "default_ref_method", "offset")
    call = Call(
        samples.shape[0],
        channels,
        samples.shape[2],
        samples.shape[3],
        text.shape[1],
        text.shape[2],
        references,
        method,
    )
    known = values.get("concat_latent_image") is not None
    return call, "" if known else "no known image in the conditioning: zeros"
