"""What stands in the hole before a model paints it: one registry of fills, and the one function over it.

A fill is `f(image, mask, **options) -> image`: [B,H,W,3] and [B,H,W] with 1 = unknown in, a whole image
[B,H,W,3] out. Each item has a known pixel (mask below 0.5), and only the hole of the result is used.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import torch
from torch import Tensor

from .. import pixels
from ..geometry import check_choice
from . import inputs
from .extend import edge, mirror, mosaic
from .inpainters import lama, ns, telea
from .noise import NEUTRAL, gaussian, known_statistics, noise, perlin
from .pyramid import push_pull


def neutral(image: Tensor, mask: Tensor) -> Tensor:
    """Mid gray, [B,H,W,3]."""
    return torch.full_like(image, NEUTRAL)


def colour(image: Tensor, mask: Tensor, colour: str | tuple[float, float, float] = "#00FF00") -> Tensor:
    """One colour, [B,H,W,3]: "#RRGGBB", or three numbers in 0..1; outpaint LoRAs want pure green."""
    return image.new_tensor(_rgb(colour)).expand_as(image)


def _rgb(colour) -> list[float]:
    if isinstance(colour, str):
        if re.fullmatch(r"#?[0-9a-fA-F]{6}", colour.strip()):
            digits = colour.strip().lstrip("#")
            return [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    elif len(colour) == 3 and all(0 <= value <= 1 for value in colour):
        return [float(value) for value in colour]
    raise ValueError(f"colour is {colour!r}: write it as #RRGGBB, such as #00FF00.")


def mean(image: Tensor, mask: Tensor) -> Tensor:
    """The known pixels' mean colour, [B,H,W,3]."""
    return known_statistics(image, mask)[0].expand_as(image)


def blur(image: Tensor, mask: Tensor) -> Tensor:
    """The known pixels' colours, ever smoother the farther away (push-pull), [B,H,W,3]."""
    known = (mask < 0.5).to(image)[:, None]
    return push_pull(image.movedim(-1, 1), known).movedim(1, -1)


def latent_noise(latent: Tensor, mask: Tensor, seed: int = 0) -> Tensor:
    """Standard normal noise, [B,C,h,w]."""
    return torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed)).to(latent)


def latent_nothing(latent: Tensor, mask: Tensor) -> Tensor:
    """Zeros, [B,C,h,w]."""
    return torch.zeros_like(latent)


Fill = Callable[..., Tensor]
FILLS: dict[str, Fill] = {
    fill.__name__: fill
    for fill in (
        neutral, colour, edge, mirror, blur, noise, mosaic, mean, gaussian, perlin, telea, ns, lama
    )
}  # fmt: skip
LATENT_FILLS: dict[str, Fill] = {fill.__name__: fill for fill in (latent_noise, latent_nothing)}
NEED_NOTHING_KNOWN = ("neutral", "colour")


def fill(canvas: Tensor, mask: Tensor, how: str, **options) -> Tensor:
    """The canvas [B,H,W,3] with what `mask` [B,H,W] marks (1 = unknown) filled; known pixels bit for bit.

    `how` is one of FILLS (options: the arguments of that function), or of LATENT_FILLS for latents [B,C,h,w]
    with a mask [B,h,w] in cells. A soft mask mixes; its pixels below 0.5 count as known. An item in which
    nothing is known becomes mid gray. float64 in, float64 out.

    Raises ValueError for an empty mask, a mask of another size, NaN, an unknown fill and unknown options.
    """
    check_choice("how", how, (*FILLS, *LATENT_FILLS))
    check_options(how, options)
    if how in LATENT_FILLS:
        return _fill_latent(canvas, mask, how, options)
    image = pixels.rgb(inputs.checked(canvas, "canvas"))
    mask = inputs.hole(mask, image.shape[1:3], of="canvas").to(image.device)
    inputs.check_painted(mask)
    batch = max(len(image), len(mask))
    image, mask = pixels.repeat_batch(image, batch), pixels.repeat_batch(mask, batch)
    if how in NEED_NOTHING_KNOWN:
        filled = FILLS[how](image, mask, **options)
    else:
        filled = neutral(image, mask)
        some = (mask < 0.5).flatten(1).any(dim=1)
        if bool(some.any()):
            filled[some] = FILLS[how](image[some], mask[some], **options)
    return torch.lerp(image, filled, mask.to(image)[..., None].expand_as(image))


def check_options(how: str, options: dict) -> None:
    """Raise ValueError for an option that the fill does not have."""
    _, _, *known = inspect.signature((FILLS | LATENT_FILLS)[how]).parameters
    for name in options.keys() - set(known):
        raise ValueError(
            f"fill '{how}' has no option {name!r}: it has {', '.join(known) if known else 'none'}."
        )


def _fill_latent(latent: Tensor, mask: Tensor, how: str, options: dict) -> Tensor:
    if latent.ndim != 4 or not latent.dtype.is_floating_point:
        raise ValueError(
            f"canvas has shape {tuple(latent.shape)} but fill '{how}' is for latents [batch, channels,"
            " height, width]: encode the image, or choose another fill."
        )
    inputs.check_finite(latent, "canvas")
    mask = inputs.hole(mask, latent.shape[2:], of="latent").to(latent)
    inputs.check_painted(mask)
    batch = max(len(latent), len(mask))
    latent, weight = pixels.repeat_batch(latent, batch), pixels.repeat_batch(mask, batch)[:, None]
    return torch.lerp(latent, LATENT_FILLS[how](latent, mask, **options), weight.expand_as(latent))
