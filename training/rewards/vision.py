"""Rewards that look at the image without a text: DINO similarity to the source, and aesthetics."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Context, Reward, register
from .clip import CLIP_L, ClipModel, centre_crop, normalise
from .weights import device_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DINO = "facebook/dino-vits16"  # the one ICEdit reports


class DinoImage(Reward):
    """Cosine of the class tokens of edit and source."""

    name, range, needs = "dino", (0.0, 1.0), frozenset({"sources"})

    def __init__(self, model: nn.Module, size: int = 224, device: str | torch.device = "cpu"):
        self.model = model.to(device).eval().requires_grad_(False)
        self.size, self.device = size, device

    def features(self, images: Tensor) -> Tensor:
        """Images [N,H,W,3] in 0..1 -> [N,D], unit length."""
        pixels = normalise(centre_crop(images.to(self.device), self.size), IMAGENET_MEAN, IMAGENET_STD)
        tokens = self.model(pixel_values=pixels.to(self.model.dtype)).last_hidden_state
        return F.normalize(tokens[:, 0].float(), dim=-1)

    def _score(self, images: Tensor, context: Context) -> Tensor:
        return (self.features(images) * self.features(context.sources)).sum(-1)


@register("dino")
def dino(path: str = DINO, device: str = "") -> Reward:
    """DINO or DINOv2 similarity of edit and source; cosine."""
    from transformers import AutoModel

    return DinoImage(AutoModel.from_pretrained(path), device=device_of(device))


class Aesthetic(Reward):
    """The LAION aesthetic predictor: linear layers on unit-length CLIP-L/14 features; usually 5 to 6.5.

    Source: christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE.pth`.
    """

    name, range = "aesthetic", (1.0, 10.0)

    def __init__(self, clip: ClipModel, head: nn.Module):
        self.clip, self.head = clip, head.eval().requires_grad_(False)

    def _score(self, images: Tensor, context: Context) -> Tensor:
        features = self.clip.image_features(images)
        return self.head.to(features.device)(features).squeeze(-1)


def aesthetic_head(state: dict[str, Tensor]) -> nn.Module:
    """The predictor's layers 768-1024-128-64-16-1 (dropout left out) from its state dict, `layers.N.weight`.

    The sizes follow the file. Raises ValueError if it holds no such layers.
    """
    numbers = sorted(
        int(key.split(".")[1]) for key in state if key.startswith("layers.") and key.endswith(".weight")
    )
    if not numbers:
        raise ValueError(
            "the aesthetic checkpoint has no layers.N.weight: give sac+logos+ava1-l14-linearMSE.pth."
        )
    layers = []
    for number in numbers:
        weight, bias = state[f"layers.{number}.weight"], state[f"layers.{number}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers)


@register("aesthetic")
def aesthetic(path: str, clip: str = CLIP_L, device: str = "") -> Reward:
    """LAION aesthetic score. `path`: the predictor's .pth file."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return Aesthetic(ClipModel.load(clip, device), aesthetic_head(state))
