"""A vision-language model as judge: the probability that it answers "yes" (Qwen2.5-VL class)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...models.image_files import to_pil
from .base import Context, Reward, register
from .weights import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
EDIT_QUESTION = (
    "The first picture was edited into the second by the instruction: {prompt}\n"
    "Was the instruction carried out, and everything else left as it was? Answer yes or no."
)
IMAGE_QUESTION = "Does this picture show: {prompt}? Answer yes or no."


class YesNo(Reward):
    """P(yes) / (P(yes) + P(no)) of the first answer token; 0..1.

    With sources the question is about the edit from source to image, otherwise about the image alone.
    `template` replaces the question and must contain {prompt}.
    """

    name, range, needs, batch_size = "vlm_yes", (0.0, 1.0), frozenset({"prompts"}), 1

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, template: str | None = None):
        if template is not None and "{prompt}" not in template:
            raise ValueError(
                f"the question {template!r} has no {{prompt}} in it: say where the instruction goes."
            )
        self.model, self.processor, self.template = model.eval().requires_grad_(False), processor, template
        tokenizer = processor.tokenizer
        self.yes = self._first_tokens(tokenizer, ("yes", "Yes", " yes", " Yes"))
        self.no = self._first_tokens(tokenizer, ("no", "No", " no", " No"))

    @staticmethod
    def _first_tokens(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> list[int]:
        return sorted({tokenizer.encode(word, add_special_tokens=False)[0] for word in words})

    def _score(self, images: Tensor, context: Context) -> Tensor:
        sources = [None] * len(images) if context.sources is None else context.sources
        rows = zip(images, context.prompts, sources, strict=True)
        return torch.stack([self._answer(image, prompt, source) for image, prompt, source in rows])

    def _answer(self, image: Tensor, prompt: str, source: Tensor | None) -> Tensor:
        """The score, a scalar, of one image [H,W,3]."""
        images = [to_pil(shown) for shown in (source, image) if shown is not None]
        template = self.template or (IMAGE_QUESTION if source is None else EDIT_QUESTION)
        content = [{"type": "image"} for _ in images]
        content.append({"type": "text", "text": template.replace("{prompt}", prompt)})
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = self.processor(text=[text], images=images, return_tensors="pt").to(self.model.device)
        chances = self.model(**inputs).logits[0, -1].float().softmax(-1)
        yes, no = chances[self.yes].sum(), chances[self.no].sum()
        return yes / (yes + no)


@register("vlm_yes")
def vlm_yes(
    path: str = QWEN, template: str | None = None, device: str = "", dtype: str = "bfloat16"
) -> Reward:
    """Edit success as a vision-language model sees it; probability."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, torch_dtype=getattr(torch, dtype))
    return YesNo(model.to(device_of(device)), AutoProcessor.from_pretrained(path), template)
