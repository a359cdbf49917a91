"""The four losses of the multimodal model, as plain functions on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FOREGROUND_WEIGHT = 5.0


class Losses(NamedTuple):
    """Scalars, None where the stage has no such loss."""

    contrastive: Tensor | None = None
    reconstruction: Tensor | None = None
    caption: Tensor | None = None
    diffusion: Tensor | None = None


def same_captions(captions: Sequence[str]) -> Tensor:
    """[B,B], True where two captions are equal."""
    numbers: dict[str, int] = {}
    codes = torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions])
    return codes[:, None] == codes[None, :]


def contrastive_loss(
    image_embeddings: Tensor, text_embeddings: Tensor, scale: float | Tensor, same: Tensor | None = None
) -> Tensor:
    """Symmetric cross entropy of scale * cosine similarities [B,B] (CLIP, arXiv 2103.00020).

    same [B,B]: which rows have equal captions (`same_captions`). An image then has several right texts, and
    its target is spread evenly over them instead of calling all but one wrong.
    """
    image, text = F.normalize(image_embeddings.float(), dim=-1), F.normalize(text_embeddings.float(), dim=-1)
    logits = scale * image @ text.T
    same = torch.eye(len(logits), device=logits.device) if same is None else same.to(logits)
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def foreground(pixels: Tensor, threshold: float = 0.2) -> Tensor:
    """[B,1,H,W] float, 1 where pixels [B,3,H,W] in -1..1 differ from the image's median colour.

    threshold: in the largest channel, of the range 0..1. Right for images on an even ground.
    """
    ground = pixels.flatten(2).median(dim=2).values[..., None, None]
    return ((pixels - ground).abs().amax(dim=1, keepdim=True) > 2 * threshold).to(pixels)


def reconstruction_loss(
    predicted: Tensor, target: Tensor, mask: Tensor | None = None, weight: float = FOREGROUND_WEIGHT
) -> Tensor:
    """Mean squared error of pixels [B,3,H,W]; those of mask [B,1,H,W] (`foreground`) count `weight` times."""
    error = (predicted.float() - target.float()).square()
    if mask is None:
        return error.mean()
    weights = (1 + (weight - 1) * mask.float()).expand_as(error)
    return (weights * error).sum() / weights.sum()


def caption_loss(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean cross entropy of the tokens of captions: logits [B,L,V], ids and mask [B,L] (1 = counts)."""
    target = input_ids.masked_fill(attention_mask == 0, -100)
    return F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=-100)


def diffusion_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of a predicted velocity sqrt(a) noise - sqrt(1 - a) data, both [B,C,h,w]."""
    return F.mse_loss(prediction.float(), target.float())
