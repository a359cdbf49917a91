"""Rewards on CLIP models of transformers: text agreement, PickScore, HPSv2.1, similarity to the source.

Images are resized by torch with antialiasing instead of through 8-bit PIL, so scores differ from the
original scripts by about 1e-3 of a cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Context, Reward, register
from .hps import load_hps_clip
from .weights import device_of

if TYPE_CHECKING:
    from transformers import CLIPModel

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"


def normalise(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Pixels [N,3,H,W] in 0..1 -> zero-mean unit-variance channels."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def centre_crop(images: Tensor, size: int) -> Tensor:
    """Images [N,H,W,3] -> [N,3,size,size]: shortest side to `size` (bicubic), centre crop; CLIP's own."""
    pixels = images.movedim(-1, 1)
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    pixels = F.interpolate(pixels, target, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return pixels[..., top : top + size, left : left + size]


def letterbox(images: Tensor, size: int) -> Tensor:
    """Images [N,H,W,3] -> [N,3,size,size]: longest side to `size` (bicubic), zero padding; HPSv2's own."""
    pixels = images.movedim(-1, 1)
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    target = (max(1, round(height * scale)), max(1, round(width * scale)))
    pixels = F.interpolate(pixels, target, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size - target[0]) // 2, (size - target[1]) // 2
    return F.pad(pixels, (left, size - target[1] - left, top, size - target[0] - top))


class ClipModel:
    """A CLIP model with its tokenizer: unit-length image and text features [N,D]."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: Callable[..., Mapping[str, Tensor]],
        device: torch.device | str = "cpu",
        resize: Callable[[Tensor, int], Tensor] = centre_crop,
    ):
        """resize: images [N,H,W,3] and a side in pixels -> [N,3,side,side]."""
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.resize = resize

    @classmethod
    def load(cls, path: str, device: str | torch.device = "", tokenizer: str | None = None) -> ClipModel:
        """From a local folder or hub id (CLIPModel format), on a device (see `weights.device_of`)."""
        from transformers import AutoTokenizer, CLIPModel

        names = AutoTokenizer.from_pretrained(tokenizer or path)
        return cls(CLIPModel.from_pretrained(path), names, device_of(str(device)))

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by before a softmax."""
        return self.model.logit_scale.exp().item()

    def image_features(self, images: Tensor) -> Tensor:
        """Images [N,H,W,3] in 0..1 -> [N,D], unit length."""
        size = self.model.config.vision_config.image_size
        weight = self.model.visual_projection.weight
        pixels = normalise(self.resize(images.to(weight.device), size)).to(weight.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """N prompts, cut to the model's context -> [N,D], unit length."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        weight = self.model.text_projection.weight
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"].to(weight.device),
            attention_mask=tokens["attention_mask"].to(weight.device),
        ).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)


class ClipText(Reward):
    """Cosine of image and prompt, times `scale`."""

    needs = frozenset({"prompts"})

    def __init__(
        self, name: str, clip: ClipModel, scale: float = 1.0, usual: tuple[float, float] = (0.1, 0.45)
    ):
        self.name, self.clip, self.scale, self.range = name, clip, scale, usual

    def _score(self, images: Tensor, context: Context) -> Tensor:
        texts = self.clip.text_features(context.prompts)
        return self.scale * (self.clip.image_features(images) * texts).sum(-1)


class ClipImage(Reward):
    """Cosine of the edit's and the source's CLIP features (CLIP-I)."""

    name, range, needs = "clip_i", (0.0, 1.0), frozenset({"sources"})

    def __init__(self, clip: ClipModel):
        self.clip = clip

    def _score(self, images: Tensor, context: Context) -> Tensor:
        return (self.clip.image_features(images) * self.clip.image_features(context.sources)).sum(-1)


@register("clip_l")
def clip_l(path: str = CLIP_L, device: str = "") -> Reward:
    """CLIP-L/14 text agreement; cosine, usually 0.1 to 0.35."""
    return ClipText("clip_l", ClipModel.load(path, device))


@register("clip_h")
def clip_h(path: str = CLIP_H, device: str = "") -> Reward:
    """CLIP-H/14 (laion) text agreement; cosine, usually 0.1 to 0.45."""
    return ClipText("clip_h", ClipModel.load(path, device))


@register("clip_i")
def clip_i(path: str = CLIP_L, device: str = "") -> Reward:
    """CLIP-L/14 similarity of edit and source; cosine."""
    return ClipImage(ClipModel.load(path, device))


@register("pickscore")
def pickscore(path: str = PICKSCORE, tokenizer: str = CLIP_H, device: str = "") -> Reward:
    """PickScore divided by 26, as Flow-GRPO and DiffusionNFT do; usually 0.7 to 1.0.

    Source: Kirstain et al. 2023, logit_scale * cosine of a CLIP-H fine-tuned on human choices.
    """
    clip = ClipModel.load(path, device, tokenizer)
    return ClipText("pickscore", clip, scale=clip.logit_scale / 26, usual=(0.6, 1.0))


@register("hpsv2")
def hpsv2(path: str, tokenizer: str = CLIP_H, device: str = "") -> Reward:
    """HPSv2.1; cosine, usually 0.20 to 0.37. `path`: HPS_v2.1_compressed.pt, or its converted folder.

    Source: Wu et al. 2023; CLIP-H fine-tuned, the whole image letterboxed instead of cropped.
    """
    from transformers import AutoTokenizer

    names = AutoTokenizer.from_pretrained(tokenizer)
    clip = ClipModel(load_hps_clip(path), names, device_of(device), resize=letterbox)
    return ClipText("hpsv2", clip, usual=(0.2, 0.37))
