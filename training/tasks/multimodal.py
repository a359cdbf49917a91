"""The multimodal model (`models/multimodal/`): captioned images to its four losses.

It has no frozen encoders: what is cached of an image is the image, eight bits a channel, and captions go to
the model's own text parts. One run of the trainer is one stage, or all losses at once (`joint`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.preprocess import Preprocessed
from ..runtime.random_streams import row_uniform
from .base import Task

MEASURED = 4096  # rows that the latents' mean and deviation are taken from
TOGETHER = 64  # of them, encoded at a time
JOINTS = frozenset("and at behind beside by from in near of on over to under with".split())
FOLLOWED = 0.02  # joint: how far the statistics of the latents go towards a batch's


class MultimodalTask(Task):
    """Full training of a preset (tiny, drawn, full) or of a folder that `save_pretrained` wrote."""

    name = "multimodal"
    denoiser_part = "."  # the folder as a whole
    text_parts = ()
    target_modules = ()
    lora_base = ""
    null_text = True

    def check_model(self) -> None:
        """Raise ValueError or FileNotFoundError for no model of this family, or one of another size."""
        from ...models.multimodal.presets import PRESETS
        from ...models.multimodal.storage import read_architecture

        c = self.config
        if c.stage == "both" and not c.joint:
            raise ValueError("stage is both, which is two runs: train each of config.runs()")
        self.stage = "joint" if c.joint else c.stage
        preset = c.model in PRESETS
        if preset and self.stage == "diffuse":
            raise ValueError(f"model is {c.model}, untrained: stage diffuse needs a folder that align wrote")
        size = (PRESETS[c.model] if preset else read_architecture(Path(c.model))).image_size
        if c.resolution != size:
            raise ValueError(f"resolution is {c.resolution} but the model's {size}: set resolution: {size}")
        if preset and c.words not in ("", "shapes") and not Path(c.words).is_file():
            raise ValueError(f"words is {c.words!r}, no file: give a text file, or shapes")

    # ---------------------------------------------------------------- no frozen encoders

    @property
    def text_dtype(self) -> torch.dtype:
        """Of no tensors: captions stay words."""
        return torch.float32

    def load_encoders(self) -> None:
        """There are none."""

    def text_to_device(self) -> None:
        """There are none."""

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """Nothing: the batch has its `prompts`."""
        return {}

    def encode_images(self, rows: list[Preprocessed]) -> dict[str, Tensor]:
        """`pixels` [B,3,S,S], uint8."""
        pixels = torch.stack([row.pixels for row in rows])
        return {"pixels": ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)}

    # ---------------------------------------------------------------- the model

    def load_denoiser(self) -> nn.Module:
        """The model of a preset, fresh, or of a folder."""
        from ...models.multimodal import PRESETS, GenerativeMultimodalModel, word_tokenizer

        c = self.config
        if c.model not in PRESETS:
            module = GenerativeMultimodalModel.from_pretrained(c.model)
        else:
            tokenizer = word_tokenizer(_words(c.words)) if c.words else None
            module = GenerativeMultimodalModel.from_preset(c.model, tokenizer)
        # Convolutions are faster in this layout, on CPUs too (1.6x for the tiny decoder).
        self.module = module.to(self.load_device, memory_format=torch.channels_last)
        self.sums: dict[str, Tensor] = {}
        self.summed = 0
        return module

    def freeze(self, module: nn.Module) -> None:
        """A stage trains its own part. In diffuse all is in eval mode: frozen encoders must not drop out, and
        the UNet has no dropout."""
        module.requires_grad_(self.stage != "diffuse")
        module.latent_diffusion.requires_grad_(self.stage != "align")
        module.train(self.stage != "diffuse")

    def make_host(self, module: nn.Module) -> None:
        """The model itself."""
        self.host = module

    @property
    def _statistics(self) -> dict[str, Tensor]:
        return dict(self.module.latent_diffusion.named_buffers(recurse=False))

    def state(self) -> dict[str, Tensor]:
        """joint: the statistics of the latents, which follow the encoder."""
        return self._statistics if self.stage == "joint" else {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for name, buffer in self._statistics.items():
            buffer.copy_(tensors[name])

    def told(self) -> dict[str, float]:
        """Each loss, unweighted."""
        means = {name: float(value) / self.summed for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        return means

    @torch.no_grad()
    def measure(self, batches: Any) -> None:
        """Mean and deviation of the latents, from rows evenly spread over the data."""
        if self.stage == "diffuse":
            return  # what align measured
        count = len(batches.entries)
        chosen = list(range(0, count, -(-count // MEASURED)))
        parts = [chosen[first : first + TOGETHER] for first in range(0, len(chosen), TOGETHER)]
        latents = [self._latents(batches(part, [False] * len(part))["pixels"]) for part in parts]
        self.module.latent_diffusion.update_statistics(torch.cat(latents))

    def _latents(self, pixels: Tensor) -> Tensor:
        image = pixels.to(self.device).float() / 127.5 - 1
        return self.module.image_decoder.get_latent_from_embedding(self.module.image_encoder(image))

    # ---------------------------------------------------------------- batches and their loss

    def draw(self, seed: int, positions: list[int]) -> dict[str, Tensor]:
        """`dropped` [B]: which rows see the null vector instead of their text; `part` [B]: which part of it
        the others see, the whole where it is 1 or more."""
        share, at = self.config.prompt_part, row_uniform(seed, positions, "part")
        return {
            "dropped": row_uniform(seed, positions, "drop") < self.config.prompt_drop,
            "part": at / share if share else torch.ones_like(at),
        }

    def noise_shape(self, batch: dict[str, Any]) -> tuple[int, ...]:
        """Of a latent."""
        return self.module.latent_diffusion.latent_shape

    def row_losses(self, batch: dict[str, Any], noise: Tensor, u: Tensor) -> Tensor:
        """The weighted sum of the stage's losses, the same for each row [B]: contrast is of a whole batch."""
        c, diffusion = self.config, self.module.latent_diffusion
        if self.stage == "joint":
            with torch.no_grad():
                diffusion.update_statistics(self._latents(batch["pixels"]), FOLLOWED)
        timesteps = (u * diffusion.num_timesteps).long().clamp_max(diffusion.num_timesteps - 1)
        captions = batch["prompts"]
        prompts = [part(text, at) for text, at in zip(captions, batch["part"].tolist(), strict=True)]
        pairs = self.module.pairs(images(batch), captions, prompts=prompts, even_ground=c.even_ground)
        found = self.host(
            pairs,
            self.stage,
            foreground_weight=c.foreground_weight,
            noise=noise,
            timesteps=timesteps.to(noise.device),
            drop=batch["dropped"],
        )
        losses = {name: loss for name, loss in found._asdict().items() if loss is not None}
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss.detach()
        self.summed += 1
        if self.stage == "diffuse":
            total = losses["diffusion"]
        else:
            total = sum(getattr(c, f"{name}_weight") * loss for name, loss in losses.items())
        return total.expand(len(pairs.pixels))

    # ---------------------------------------------------------------- sample sheets

    def shown(self, batch: dict[str, Any], noise: Tensor, targets: bool) -> dict[str, Tensor | None]:
        """The image, it from its own embedding, from its caption's, and (not in align) by diffusion."""
        c, model = self.config, self.module
        image = images(batch)
        text = model.encode_text(batch["prompts"])
        direct = {"decoded": model.encode_image(image), "from text": text}
        shown = {"image": image} | {
            name: model.decode(model.image_decoder.get_latent_from_embedding(embedding))
            for name, embedding in direct.items()
        }
        if self.stage != "align":
            made = model.generate_image_from_text(text, c.sample_steps, cfg=c.sample_guidance, noise=noise)
            shown["diffusion"] = made
        return shown

    def title(self, batch: dict[str, Any], prompt: str) -> str:
        """The caption, or what the model reads in the image instead."""
        read = self.module.generate_text_from_image(self.module.encode_image(images(batch)))[0]
        return prompt if read == prompt else f"wrongly read as: {read}"


def images(batch: dict[str, Any]) -> Tensor:
    """A batch's images as IMAGE [B,S,S,3] in 0..1."""
    return batch["pixels"].movedim(1, -1).float() / 255


def part(text: str, at: float) -> str:
    """One of the `parts` of a text, all alike in 0..1; at 1 and above, and where it has none, the whole."""
    found = parts(text)
    return text if at >= 1 or not found else found[int(at * len(found))]


def parts(text: str) -> list[str]:
    """What stands between the small words of a text ("a red circle" of "a red circle at the top left"), and
    such phrases in a row, but not the whole."""
    words = text.split()
    joints = [i for i, word in enumerate(words) if word.lower() in JOINTS and 0 < i < len(words) - 1]
    starts, ends = [0, *(i + 1 for i in joints)], [*joints, len(words)]
    runs = [(a, b) for a in starts for b in ends if a < b and (a, b) != (0, len(words))]
    return [" ".join(words[a:b]).strip(",.;") for a, b in runs]


def _words(text: str) -> list[str]:
    """Every word of the shapes world, or of a text file."""
    if text == "shapes":
        from ..tiny.text import words

        return words()
    plain = Path(text).read_text(encoding="utf-8").lower()
    return sorted({word.strip(",.;:!?\"'()-") for word in plain.split()} - {""})
