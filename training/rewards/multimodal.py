"""A multimodal model of the pack (`models/multimodal/`) as a reward: how like its text an image is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Context, Reward, register
from .weights import device_of

if TYPE_CHECKING:
    from ...models.multimodal import GenerativeMultimodalModel


class TextSimilarity(Reward):
    """Cosine of image and prompt in the space that the model's two encoders share.

    NaN for a prompt of which the model knows no word.
    """

    name, range, needs = "multimodal", (-1.0, 1.0), frozenset({"prompts"})

    def __init__(self, model: GenerativeMultimodalModel):
        self.model = model.eval().requires_grad_(False)

    def _score(self, images: Tensor, context: Context) -> Tensor:
        from ...models.multimodal.reading import read_words

        tokenizer, prompts = self.model.tokenizer, list(context.prompts)
        known = {text for text in set(prompts) if read_words(tokenizer, text)}
        rows = [row for row, text in enumerate(prompts) if text in known]
        scores = torch.full((len(images),), torch.nan)
        if rows:
            texts = sorted({prompts[row] for row in rows})
            cosines = self.model.similarity(images[rows], texts).cpu()
            scores[rows] = cosines[range(len(rows)), [texts.index(prompts[row]) for row in rows]]
        return scores


@register("multimodal")
def multimodal(path: str = "", device: str = "") -> Reward:
    """Image-text similarity; cosine. `path`: the model's folder, by default the bundled one (shapes)."""
    from ...models.multimodal import GenerativeMultimodalModel
    from ...models.multimodal.storage import bundled

    folder = Path(path) if path else bundled()
    return TextSimilarity(GenerativeMultimodalModel.from_pretrained(folder, device=device_of(device)))
