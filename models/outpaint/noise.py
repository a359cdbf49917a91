"""Fills that are random: noise with the image's own spectrum (Outpainting mk2), plain and Perlin noise."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .inputs import whole_number

KNOWN_BELOW, HOLE_ABOVE = 1e-3, 1e-6  # of a soft mask: what mk2 takes colours from, and what it replaces
NEUTRAL = 0.5


def noise(
    image: Tensor, mask: Tensor, noise_q: float = 1.0, color_variation: float = 0.05, seed: int = 0
) -> Tensor:
    """Outpainting mk2's matched noise [B,H,W,3] (g-diffuser-bot's `get_matched_noise`), in float64.

    The spectrum is the image's own, hole included as it is (mk2's holes are black), the colours those of the
    known pixels. `noise_q`: exponent of the spectrum, 0 rough to 2 smooth. `color_variation`: 0 gray noise to
    1 independent channels. Every item gets the noise of the same seed.
    """
    check_number("noise_q", noise_q, 0, 8)
    check_number("color_variation", color_variation, 0, 1)
    pairs = zip(*(planes.double().cpu().numpy() for planes in (image, mask)), strict=True)
    filled = [_matched_noise(*pair, noise_q, color_variation, seed) for pair in pairs]
    return torch.from_numpy(np.stack(filled)).to(image)


def _matched_noise(image, mask, noise_q: float, color_variation: float, seed: int):
    """image [H,W,3], mask [H,W] float64 -> noise, meant for where the mask is above 0."""
    height, width = mask.shape
    gray = (mask + mask + mask) / 3  # as mk2 rounds the mean of three equal channels
    hole, known = gray > HOLE_ABOVE, gray < KNOWN_BELOW
    if not known.any():
        return np.full_like(image, NEUTRAL)
    windowed = image * (1 - gray[..., None])
    windowed /= max(windowed.max(), 1e-12)
    windowed += image.mean() * mask[..., None]
    spectrum = _fft(windowed)
    amplitude = np.abs(spectrum)
    phase = np.divide(spectrum, amplitude, out=np.zeros_like(spectrum), where=amplitude > 0)

    y, x = ((np.arange(side) / side * 2 - 1) * (side / min(height, width)) for side in (height, width))
    lowpass = 1 / ((y[:, None, None] ** 2 + 1) * (x[None, :, None] ** 2 + 1))
    start = np.random.default_rng(seed).random((height, width, 3))
    start = start * color_variation + (1 - color_variation) * (start.sum(axis=2, keepdims=True) / 3)
    start = _ifft(_fft(start) * lowpass)
    shaped = _ifft(np.abs(_fft(start)) ** 2 * amplitude**noise_q * phase)
    shaped -= shaped.min()
    shaped /= max(shaped.max(), 1e-12)
    for channel in range(3):
        shaped[hole, channel] = _match_histogram(shaped[hole, channel], image[known, channel])
    return shaped.clip(0, 1)


def _fft(planes):
    """Orthonormal FFT over the first two axes, its origin in the middle on both sides."""
    return np.fft.ifftshift(
        np.fft.fft2(np.fft.fftshift(planes, axes=(0, 1)), axes=(0, 1), norm="ortho"), axes=(0, 1)
    )


def _ifft(planes):
    """The real part of the inverse of `_fft`."""
    return np.fft.ifftshift(
        np.fft.ifft2(np.fft.fftshift(planes, axes=(0, 1)), axes=(0, 1), norm="ortho"), axes=(0, 1)
    ).real


def _match_histogram(values, reference):
    """The values with their order kept and the reference's distribution."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    levels, frequency = np.unique(reference, return_counts=True)
    return np.interp(np.cumsum(counts) / values.size, np.cumsum(frequency) / reference.size, levels)[place]


def gaussian(image: Tensor, mask: Tensor, seed: int = 0) -> Tensor:
    """Normal noise [B,H,W,3] with the mean and spread of the known pixels, channel by channel."""
    generator = torch.Generator().manual_seed(seed)
    return _spread(torch.randn(image.shape[1:], generator=generator), image, mask)


def perlin(image: Tensor, mask: Tensor, cell: int = 64, octaves: int = 4, seed: int = 0) -> Tensor:
    """Perlin's gradient noise [B,H,W,3]: features up to `cell` px, mean and spread of the known pixels."""
    cell, octaves = whole_number(cell, "cell", 1), whole_number(octaves, "octaves", 1)
    generator = torch.Generator().manual_seed(seed)
    height, width, channels = image.shape[1:]
    total = torch.zeros(channels, height, width)
    for octave in range(octaves):
        total += _gradient_noise(channels, height, width, cell / 2**octave, generator) / 2**octave
    total -= total.mean(dim=(1, 2), keepdim=True)
    total /= total.std(dim=(1, 2), keepdim=True, unbiased=False).clamp(min=1e-6)
    return _spread(total.movedim(0, -1), image, mask)


def _gradient_noise(planes: int, height: int, width: int, cell: float, generator) -> Tensor:
    """[planes,height,width]: random slopes at the corners of a grid of `cell` px, faded into one another."""
    (row, y), (column, x) = (_grid(side, cell) for side in (height, width))
    angle = torch.rand(planes, int(row[-1]) + 2, int(column[-1]) + 2, generator=generator) * 2 * math.pi
    down, across = angle.sin(), angle.cos()

    def corner(i: int, j: int) -> Tensor:
        rows, columns = (row + i)[:, None], (column + j)[None]
        return down[:, rows, columns] * (y - i)[:, None] + across[:, rows, columns] * (x - j)[None]

    fade_y, fade_x = (t**3 * (t * (t * 6 - 15) + 10) for t in (y, x))
    upper, lower = (torch.lerp(corner(i, 0), corner(i, 1), fade_x[None]) for i in (0, 1))
    return torch.lerp(upper, lower, fade_y[:, None])


def _grid(length: int, cell: float) -> tuple[Tensor, Tensor]:
    """(grid cell, place within it) of each pixel's centre."""
    place = (torch.arange(length) + 0.5) / cell
    return place.floor().long(), place - place.floor()


def _spread(normal: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Noise of mean 0 and deviation 1 [H,W,3], the same for every item, given each item's own statistics."""
    mean, deviation = known_statistics(image, mask)
    return (mean + deviation * normal.to(image)).clamp(0, 1)


def known_statistics(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) [B,1,1,3] over the pixels whose mask is below 0.5."""
    known = (mask < 0.5).double()[..., None]
    count = known.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    mean = (image * known).sum(dim=(1, 2), keepdim=True) / count
    variance = ((image - mean).square() * known).sum(dim=(1, 2), keepdim=True) / count
    return mean.to(image), variance.sqrt().to(image)


def check_number(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}: use {low} to {high}.")
