"""What a sampler or a trainer needs of a model: text, a condition, one prediction, and the way to pixels.

Not for weights or architectures: those stand in `flux_fill.py`, `flux_kontext.py` and `sd_inpaint.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .packing import TOKEN_PIXELS, VAE_FACTOR
from .pixels import as_image, as_mask, binarise, rgb

# Of one VAE call, in pixels of its images together; a single image is never cut. By ComfyUI's estimate
# decoding takes 2178 numbers a pixel: in float32 4.6 GB for 512 x 1024.
DECODED_PIXELS = 1 << 19
ENCODED_PIXELS = 1 << 21


class _Batched:
    """Batch handling of the frozen dataclasses below; `_unbatched` names fields without a batch axis."""

    _unbatched: tuple[str, ...] = ()

    def _map(self, change: Callable[[Tensor], Tensor], *, everything: bool = False):
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, _Batched):
                changed[field.name] = value._map(change, everything=everything)
            elif isinstance(value, Tensor) and (everything or field.name not in self._unbatched):
                changed[field.name] = change(value)
        return replace(self, **changed)

    def take(self, index: int | slice | Sequence[int] | Tensor):
        """The given samples, as a batch (an int gives a batch of one)."""
        if isinstance(index, int):
            index = [index]
        if not isinstance(index, (slice, Tensor)):
            index = torch.as_tensor(list(index))
        return self._map(lambda x: x[index.to(x.device) if isinstance(index, Tensor) else index])

    def repeat(self, times: int):
        """Every sample `times` times in a row: a, a, b, b. What a GRPO group needs."""
        return self._map(lambda x: x.repeat_interleave(times, dim=0))

    def expand(self, batch: int):
        """A batch of one as a batch of `batch`; one of that size as it is. Raises ValueError otherwise."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(f"a batch of {len(self)} cannot be used for {batch} samples: pass 1 or {batch}")
        return self.repeat(batch)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        """On `device`, floating-point members that have a batch axis in `dtype` (positions stay float32)."""
        moved = self._map(lambda x: x.to(device), everything=True) if device is not None else self
        return moved._map(lambda x: x.to(dtype)) if dtype is not None else moved

    def detach(self):
        return self._map(lambda x: x.detach(), everything=True)


@dataclass(frozen=True)
class TextEmbedding(_Batched):
    """Encoded prompts: `tokens` [B, L, D]; `pooled` [B, P] for FLUX, None for Stable Diffusion.

    bias: [B, L], added to the attention logits of the tokens (FLUX only); None adds nothing.
    ids: [L, 3], the tokens' positions (FLUX only); None is FLUX's zeros.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    bias: Tensor | None = None
    ids: Tensor | None = None

    _unbatched = ("ids",)

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class Condition(_Batched):
    """Everything a prediction depends on besides x and sigma. An image joins it in one of two ways:

    features: channel-wise, beside the noisy latents, position by position. FLUX Fill: tokens [B, S, 320]
        (64 of the masked image, 256 of the mask); SD inpainting: spatial [B, 5, h, w] (mask, masked image).
    references, reference_ids: sequence-wise, after the noisy tokens. Kontext: [B, R, 64] and [R, 3].

    guidance: [B], the embedded guidance (None for a model without). cfg: scale of classifier-free guidance
    against `negative`; 1 switches it off.
    """

    text: TextEmbedding
    guidance: Tensor | None = None
    features: Tensor | None = None
    references: Tensor | None = None
    reference_ids: Tensor | None = None
    negative: TextEmbedding | None = None
    cfg: float = 1.0

    _unbatched = ("reference_ids",)

    def __len__(self) -> int:
        return len(self.text)

    @property
    def uses_cfg(self) -> bool:
        """Whether every prediction takes two model calls, one of them with the negative prompt."""
        return self.negative is not None and self.cfg != 1.0


@runtime_checkable
class Denoiser(Protocol):
    """A velocity model on spatial model-space latents: sigma 1 is noise, 0 is data, v = noise - data."""

    device: torch.device

    def encode_text(self, prompts: str | Sequence[str]) -> TextEmbedding:
        """Encode prompts; no gradient."""

    def encode(self, image: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """IMAGE [B,H,W,3] in 0..1 to model-space latents: posterior mode, or a sample with a generator."""

    def condition(self, text: TextEmbedding, *args, **kwargs) -> Condition:
        """The condition of one edit; its own images and masks per model."""

    def velocity(self, x: Tensor, sigma: Tensor | float, condition: Condition) -> Tensor:
        """v of the same shape as x; differentiable in x and in the weights."""

    def decode(self, x0: Tensor) -> Tensor:
        """Model-space latents to IMAGE [B,H,W,3] float32 in 0..1; differentiable."""


def model_pixels(image: Tensor, multiple: int = TOKEN_PIXELS, name: str = "image") -> Tensor:
    """An IMAGE [B,H,W,C] (or [H,W,C]) as a VAE takes it: [B,3,H,W] float32 in -1..1; alpha is dropped.

    Raises ValueError for a shape that is no image, or a side that is not a multiple of `multiple` pixels.
    """
    image = rgb(as_image(image, name))
    height, width = image.shape[1:3]
    if height % multiple or width % multiple:
        raise ValueError(
            f"{name} is {width}x{height} pixels: resize or crop it so that both sides divide by {multiple}"
        )
    return image.movedim(-1, 1) * 2 - 1


def hard_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A MASK [B,H,W] (or [H,W], [B,1,H,W]) as [B,1,H,W] float32 of 0 and 1, cut at 0.5 as in diffusers.

    Raises ValueError if its size is not the image's.
    """
    return binarise(sized_mask(mask, height, width))[:, None]


def sized_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A MASK of any shape as [B,H,W] float32 in 0..1. Raises ValueError if its size is not the image's."""
    mask = as_mask(mask)
    if tuple(mask.shape[1:]) != (height, width):
        raise ValueError(
            f"mask is {mask.shape[2]}x{mask.shape[1]} but the image is {width}x{height}: "
            "resize the mask to the image's size"
        )
    return mask


def as_sigma(sigma: Tensor | float, x: Tensor) -> Tensor:
    """sigma as float32 [B] on x's device. Raises ValueError if it is neither a scalar nor one per sample."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).flatten()
    if sigma.numel() not in (1, x.shape[0]):
        raise ValueError(
            f"sigma has {sigma.numel()} values for a batch of {x.shape[0]}: pass one or one each"
        )
    return sigma.expand(x.shape[0])


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """What a VAE [B,3,8h,8w] makes of its latents [B,C,h,w], `DECODED_PIXELS` at a time; differentiable."""
    count = max(1, DECODED_PIXELS // (latents.shape[-2] * latents.shape[-1] * VAE_FACTOR**2))
    parts = [vae.decode(some, return_dict=False)[0] for some in latents.split(count)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def posterior(vae: Any, pixels: Tensor) -> Any:
    """The distribution that a VAE encodes pixels [B,3,H,W] to, `ENCODED_PIXELS` at a time; differentiable."""
    count = max(1, ENCODED_PIXELS // (pixels.shape[-2] * pixels.shape[-1]))
    parts = [vae.encode(some).latent_dist for some in pixels.split(count)]
    return parts[0] if len(parts) == 1 else type(parts[0])(torch.cat([part.parameters for part in parts]))


def same_batch(**tensors: Tensor) -> dict[str, Tensor]:
    """Named tensors [B,...] at one batch size, 1 going to N. Raises ValueError naming the odd one out."""
    batch = max(x.shape[0] for x in tensors.values())
    for name, x in tensors.items():
        if x.shape[0] not in (1, batch):
            raise ValueError(
                f"{name} has a batch of {x.shape[0]} but {batch} samples are asked for: pass 1 or {batch}"
            )
    return {name: x.expand(batch, *x.shape[1:]) for name, x in tensors.items()}
