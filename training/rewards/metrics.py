"""Distances between two batches of images: PSNR, SSIM, and what changed outside an edit.

Images are [N,H,W,3] in 0..1; every function returns one number (or map) per image and is differentiable.
Judgements that need a model are in `rewards/`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PSNR_CAP = 100.0  # dB; equal images have no finite PSNR, and an average needs one
CHANGED = 0.1  # mean channel difference above which a pixel of a pair counts as edited


def _same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"images are {tuple(a.shape)} and {tuple(b.shape)}: compare two [N,H,W,C] of one size"
        )


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [N]: -10 log10 of the mean squared error, at most `PSNR_CAP`."""
    _same(a, b)
    error = (a.float() - b.float()).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(10 ** (-PSNR_CAP / 10)))


def _blur(x: Tensor, kernel: Tensor) -> Tensor:
    """Separable blur of [M,1,H,W] with mirrored borders."""
    pad = len(kernel) // 2
    x = functional.pad(x, (pad, pad, pad, pad), mode="reflect")
    return functional.conv2d(functional.conv2d(x, kernel[None, None, None]), kernel[None, None, :, None])


def ssim_map(a: Tensor, b: Tensor, *, sigma: float = 1.5, window: int = 11) -> Tensor:
    """Structural similarity of every pixel, mean over channels, [N,H,W] in -1..1.

    Wang et al. 2004, eq. 13: Gaussian window 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, data range 1. Raises
    ValueError for images smaller than the window.
    """
    _same(a, b)
    if min(a.shape[1:3]) < window:
        raise ValueError(
            f"images are {a.shape[2]}x{a.shape[1]}: SSIM needs at least {window}x{window} pixels"
        )
    n, height, width, channels = a.shape
    x, y = (p.float().movedim(-1, 1).reshape(n * channels, 1, height, width) for p in (a, b))
    at = torch.arange(window, dtype=torch.float32, device=x.device) - window // 2
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    mean_x, mean_y = _blur(x, kernel), _blur(y, kernel)
    var_x, var_y = _blur(x * x, kernel) - mean_x**2, _blur(y * y, kernel) - mean_y**2
    covariance = _blur(x * y, kernel) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.reshape(n, channels, height, width).mean(1)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity, [N] in -1..1, without the 5 border pixels, whose windows are cut."""
    similarity, edge = ssim_map(a, b), 5
    if min(similarity.shape[1:]) > 2 * edge:
        similarity = similarity[:, edge:-edge, edge:-edge]
    return similarity.mean((1, 2))


def kept_l1(edited: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference to the source outside `mask` [N,H,W] (1 = edited): [N], NaN where nothing is
    outside.
    """
    _same(edited, source)
    keep = (mask < 0.5).to(edited)[..., None]
    total = ((edited - source).abs() * keep).flatten(1).sum(1)
    return total / (keep.flatten(1).sum(1) * edited.shape[-1])


def changed_region(source: Tensor, target: Tensor, threshold: float = CHANGED) -> Tensor:
    """The edit mask [N,H,W] of pairs that come without one: where the two differ by more than `threshold`."""
    _same(source, target)
    return ((source - target).abs().mean(-1) > threshold).to(source)
