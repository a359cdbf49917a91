"""What the functions of this room accept, checked once, before any work is done."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import pixels


def checked(image: Tensor, name: str = "image") -> Tensor:
    """[B,H,W,C] or [H,W,C] float -> [B,H,W,C], float64 staying float64, everything else float32.

    Raises ValueError for what `pixels.as_image` refuses, for an image of one pixel and for NaN.
    """
    checked = pixels.as_image(image, name)
    if image.dtype == torch.float64:
        checked = image if image.ndim == 4 else image[None]
    if checked.shape[1:3] == (1, 1):
        raise ValueError(f"{name} is 1x1: give an image of at least two pixels.")
    return checked


def hole(mask: Tensor, size: tuple[int, int], name: str = "mask", of: str = "image") -> Tensor:
    """A mask in any usual shape -> float32 (float64 stays) [B,H,W] of exactly `size` (height, width).

    Raises ValueError for a mask of another size and for NaN.
    """
    given, mask = mask, pixels.as_mask(mask, name)
    if given.dtype == torch.float64:
        mask = given.reshape(mask.shape).clamp(0, 1)
    if tuple(mask.shape[1:]) != tuple(size):
        raise ValueError(
            f"{name} is {mask.shape[2]}x{mask.shape[1]} but the {of} is {size[1]}x{size[0]}:"
            f" resize the mask or connect the {of}'s own."
        )
    return mask


def check_finite(values: Tensor, name: str) -> None:
    """Raise ValueError for NaN and infinity in latents; `pixels` checks images and masks."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity: make it again, its VAE or model in float32.")


def check_painted(mask: Tensor, name: str = "mask") -> None:
    """Raise ValueError if some item of the mask [B,H,W] has nothing to paint."""
    empty = (mask.flatten(1).amax(dim=1) <= 0).nonzero().flatten().tolist()
    if empty:
        which = f" in item {empty[0]}" if len(mask) > 1 else ""
        raise ValueError(f"{name} is empty{which} (its largest value is 0): mark what is unknown with 1.")


def whole_number(value, name: str, least: int = 0) -> int:
    """The value as an int; ValueError if it is not a whole number of at least `least`."""
    if not math.isfinite(value) or value != int(value) or value < least:
        raise ValueError(f"{name} is {value}: give a whole number of at least {least}.")
    return int(value)
