"""Fills by somebody else's inpainting: OpenCV's two classics, and LaMa through spandrel."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from ... import missing
from .. import pixels
from .inputs import whole_number


def telea(image: Tensor, mask: Tensor, radius: int = 3) -> Tensor:
    """OpenCV's fast marching (Telea, 2004) on [B,H,W,3], 8-bit, `radius` px; for small holes."""
    return _opencv("telea", "INPAINT_TELEA", image, mask, radius)


def ns(image: Tensor, mask: Tensor, radius: int = 3) -> Tensor:
    """OpenCV's Navier-Stokes (Bertalmio et al., 2001) on [B,H,W,3], 8-bit, `radius` px; for small holes."""
    return _opencv("ns", "INPAINT_NS", image, mask, radius)


def _opencv(how: str, method: str, image: Tensor, mask: Tensor, radius: int) -> Tensor:
    cv2 = _library("cv2", "OpenCV", how)
    radius = whole_number(radius, "radius", 1)
    bytes_in = image.clamp(0, 1).mul(255).round().byte().cpu().numpy()
    holes = (mask >= 0.5).byte().mul(255).cpu().numpy()
    filled = [
        torch.from_numpy(cv2.inpaint(item, hole, radius, getattr(cv2, method)))
        for item, hole in zip(bytes_in, holes, strict=True)
    ]
    return torch.stack(filled).to(image) / 255


def lama(image: Tensor, mask: Tensor, model: str | Path | None = None, size: int = 256) -> Tensor:
    """A LaMa file (Suvorov et al., 2022) on [B,H,W,3], the short side at `size` px, as it was trained.

    `model` is the file's path; spandrel reads it. Raises ValueError if it is missing or no LaMa.
    """
    size = whole_number(size, "size", 16)
    if model is None or not Path(model).is_file():
        raise ValueError(
            f"model is {str(model) if model else 'missing'}: fill 'lama' needs a LaMa file such as"
            " big-lama.pt, in ComfyUI's models/inpaint or models/upscale_models, or another fill."
        )
    network = _load_lama(str(model)).to(image.device)
    height, width = image.shape[1:3]
    scale = min(1.0, size / min(height, width))
    small = max(round(height * scale), 1), max(round(width * scale), 1)
    shrunk = pixels.resize_image(image.float(), *small).movedim(-1, 1)
    hole = pixels.resize_mask((mask >= 0.5).float(), *small)[:, None]
    with torch.no_grad():
        parts = [network(*pair).float() for pair in zip(shrunk.split(1), hole.split(1), strict=True)]
    filled = torch.cat(parts)[..., : small[0], : small[1]].movedim(1, -1).clamp(0, 1)
    return pixels.resize_image(filled, height, width).to(image)


def _load_lama(path: str):
    """spandrel's descriptor of a masked-image model: a callable (image, mask) -> image in [B,3,h,w]."""
    spandrel = _library("spandrel", "spandrel", "lama")
    try:
        network = spandrel.ModelLoader(device="cpu").load_from_file(path)
    except Exception as error:  # spandrel has one exception per reason, and torch has more
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"model is {path}: spandrel cannot read it ({reason}), choose a LaMa file."
        ) from error
    if not isinstance(network, spandrel.MaskedImageModelDescriptor):
        name = getattr(getattr(network, "architecture", None), "name", type(network).__name__)
        raise ValueError(f"model is {path}, a {name} model, which fills no holes: choose a LaMa file.")
    return network.eval()


def _library(module: str, name: str, how: str):
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"how is '{how}' but {name} is not installed: run {missing.install(module)}, "
            "or choose another fill."
        ) from error
