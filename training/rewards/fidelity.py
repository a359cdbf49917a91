"""Rewards computed from pixels alone: what was to be kept was kept, and JPEG size."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from ...models.image_files import to_pil
from ...models.pixels import binarise, resize_mask
from .base import Context, Reward, register
from .metrics import kept_l1, ssim_map
from .weights import device_of


def _hard(masks: Tensor, images: Tensor) -> Tensor:
    """Masks [N,h,w] at the size of images [N,H,W,3], 0 or 1: [N,H,W]."""
    return binarise(resize_mask(masks.to(images), *images.shape[1:3]))


@register("keep_l1")
class KeepL1(Reward):
    """1 - mean absolute difference to the source outside the mask; NaN where the mask covers all."""

    name, range, needs = "keep_l1", (0.0, 1.0), frozenset({"sources", "masks"})

    def _score(self, images: Tensor, context: Context) -> Tensor:
        return 1 - kept_l1(images, context.sources.to(images), _hard(context.masks, images))


@register("keep_ssim")
class KeepSSIM(Reward):
    """Mean SSIM to the source outside the mask; NaN where the mask covers all."""

    name, range, needs = "keep_ssim", (-1.0, 1.0), frozenset({"sources", "masks"})

    def _score(self, images: Tensor, context: Context) -> Tensor:
        keep = 1 - _hard(context.masks, images)
        similarity = ssim_map(images, context.sources.to(images))
        return (similarity * keep).sum((1, 2)) / keep.sum((1, 2))


@register("jpeg_size")
class JpegSize(Reward):
    """Minus the JPEG size in units of 500 kB (quality 95): compressible images score high.

    Source: ddpo-pytorch's incompressibility reward and its negative.
    """

    name, range = "jpeg_size", (-1.0, 0.0)

    def _score(self, images: Tensor, context: Context) -> Tensor:
        sizes = []
        for image in images:
            buffer = io.BytesIO()
            to_pil(image).save(buffer, "JPEG", quality=95)
            sizes.append(-buffer.tell() / 500_000)
        return torch.tensor(sizes)


@register("keep_lpips")
class KeepLPIPS(Reward):
    """1 - LPIPS distance to the source, the edited area taken from the source; needs the package lpips."""

    name, range, needs = "keep_lpips", (0.0, 1.0), frozenset({"sources", "masks"})
    package = "lpips"

    def __init__(self, net: str = "alex", device: str = ""):
        import lpips

        self.device = device_of(device)
        model = lpips.LPIPS(net=net, verbose=False).to(self.device)
        self.model = model.eval().requires_grad_(False)

    def _score(self, images: Tensor, context: Context) -> Tensor:
        images = images.to(self.device)
        sources, edited = context.sources.to(images), _hard(context.masks, images)[..., None]
        kept = images * (1 - edited) + sources * edited
        distance = self.model(kept.movedim(-1, 1) * 2 - 1, sources.movedim(-1, 1) * 2 - 1)
        return 1 - distance.flatten()
