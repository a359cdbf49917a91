"""What Fill and Kontext share: FLUX's text, velocities as predictions, sigmas as times and noise levels."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...samplers import flow_match, schedule
from ...samplers.gaussian import per_sample
from ..data.sample import Sample
from ..runtime.random_streams import row_uniform
from . import initial, losses, padding
from .base import Task
from .sampling import lora_at


class FluxTask(Task):
    """Base of the FLUX families; `host_class` is their denoiser in `models/`."""

    denoiser_part = "transformer"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    @property
    def tokens(self) -> int:
        """Length that prompts are padded to for T5."""
        return min(self.config.max_sequence_length, self.parts["tokenizer_2"].model_max_length)

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`tokens` [B,L,D] of T5, `pooled` [B,P] of CLIP; with text_lengths `words` [B], T5's lengths."""
        from ...models.flux_text import _token_ids

        clip = _token_ids(self.parts["tokenizer"], prompts, self.parts["tokenizer"].model_max_length)
        t5 = _token_ids(self.parts["tokenizer_2"], prompts, self.tokens)
        pooled = self.parts["text_encoder"](clip.to(self.device)).pooler_output
        tokens = self.parts["text_encoder_2"](t5.to(self.device))[0]
        out = {"tokens": tokens, "pooled": pooled.to(tokens.dtype)}
        if self.config.text_lengths:
            out["words"] = (t5 != self.parts["tokenizer_2"].pad_token_id).sum(1).to(tokens.device)
            padding.check_alike(tokens, out["words"])
        return out

    def text_fingerprint(self) -> str:
        """As of `Task`; other with text_lengths, where the lengths are cached too."""
        kind = "words " if self.config.text_lengths else ""
        return kind + super().text_fingerprint()

    @cached_property
    def text_widths(self) -> tuple[int, int]:
        """Widths of T5 tokens and pooled CLIP vector that the denoiser takes."""
        from diffusers import FluxTransformer2DModel

        config = FluxTransformer2DModel.load_config(self.config.model, subfolder=self.denoiser_part)
        return config["joint_attention_dim"], config["pooled_projection_dim"]

    def check_widths(self, sample: Sample) -> None:
        """Raise ValueError for a precomputed row whose text is another model's."""
        ready = sample.encoded
        widths = (ready.prompt_embed.shape[-1], ready.pooled_prompt_embeds.shape[-1])
        if widths != self.text_widths:
            wanted = " and ".join(map(str, self.text_widths))
            raise ValueError(
                f"{sample.name}: prompt_embed and pooled_prompt_embeds are {widths[0]} and {widths[1]} wide "
                f"where {self.config.model} takes {wanted}: set model to the one that encoded the data"
            )

    # ---------------------------------------------------------------- the denoiser

    def fitted(self, module: nn.Module) -> nn.Module:
        """The transformer with this family's input channels; fresh ones begin as the identity."""
        if self.config.init == "random":
            initial.zero_modulation(module)
        return initial.with_inputs(module, self.denoiser_input[0])

    def host_class(self) -> type:
        """The family's denoiser in `models/`."""
        raise NotImplementedError

    def make_host(self, module: nn.Module) -> None:
        """Wrap the (possibly distributed) transformer as `host_class`."""
        from ...models.flux_text import FluxText

        names = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
        self.host = self.host_class()(
            self.module,
            self.vae,
            FluxText(*(self.parts.get(name) for name in names)),
            device=self.device,
            max_text_tokens=self.tokens if "tokenizer_2" in self.parts else 512,
        )
        self.host.transformer = module
        if self.config.method == "full":
            self.host.dtype = torch.float32
        elif self.config.base_dtype == "float8_e4m3fn":
            self.host.dtype = torch.bfloat16

    # ---------------------------------------------------------------- batches and their loss

    def draw(self, seed: int, positions: list[int]) -> dict[str, Tensor]:
        """`guidance` [B] up to guidance_max and `text_lengths` [B], where the recipe draws them."""
        c, out = self.config, {}
        if c.guidance_max:
            u = row_uniform(seed, positions, "guidance").float()
            out["guidance"] = c.guidance + (c.guidance_max - c.guidance) * u
        if c.text_lengths:
            u = row_uniform(seed, positions, "text length")
            out["text_lengths"] = torch.tensor(c.text_lengths)[(u * len(c.text_lengths)).long()]
        return out

    def text(self, batch: dict[str, Any]) -> Any:
        """The batch's prompts as a `models.denoiser.TextEmbedding`."""
        from ...models.denoiser import TextEmbedding

        if "words" not in batch:
            ids = batch["text_ids"][0] if "text_ids" in batch else None
            return TextEmbedding(batch["tokens"], batch["pooled"], batch.get("text_bias"), ids)
        words = batch["words"]
        lengths = batch.get("text_lengths", torch.full_like(words, self.tokens))
        tokens, bias = padding.merged(batch["tokens"], words, lengths)
        return TextEmbedding(tokens, batch["pooled"], bias)

    def row_losses(self, batch: dict[str, Any], noise: Tensor, u: Tensor) -> Tensor:
        """Weighted squared error of the velocity per row [B] (SD3, arXiv 2403.03206, section 3)."""
        from diffusers.training_utils import compute_loss_weighting_for_sd3

        c = self.config
        sigma = losses.sigma_from_uniform(u, *c.sigmas).to(noise.device)
        x, target = losses.noised(batch["latents"], noise, sigma)
        prediction = self.predict(x, sigma, batch, batch.get("guidance", c.guidance))
        rows = losses.weighted_mse(prediction, target, self.cells(batch, x), batch.get("weight"))
        return rows * compute_loss_weighting_for_sd3(c.loss_weighting, sigma)

    # ---------------------------------------------------------------- prediction and sampling

    def predict(
        self, x: Tensor, time: float | Tensor, batch: dict[str, Any], guidance: float | Tensor
    ) -> Tensor:
        """The velocity at (x, sigma)."""
        return self.host.velocity(x.float(), time, self.condition(batch, guidance))

    @staticmethod
    def noised(x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(x, sigma): noise levels are sigmas."""
        return losses.noised(x0, noise, level)[0], level

    @staticmethod
    def data_prediction(x: Tensor, time: Tensor, prediction: Tensor) -> Tensor:
        """x - sigma v."""
        return x - per_sample(time, x, "time") * prediction

    @staticmethod
    def data_weight(time: Tensor) -> Tensor:
        """1 at every sigma."""
        return torch.ones_like(time)

    @staticmethod
    def noise_share(time: Tensor) -> Tensor:
        """sigma^2."""
        return time**2

    def rollout(self, batch, noise, settings, generators=None, *, steps=None, callback=None):
        """By flow matching, on FLUX's schedule for as many tokens as the noise has."""
        sigmas = schedule.sigmas(settings.steps, seq_len=schedule.token_count(*noise.shape[-2:]))
        start, end = steps or (0, settings.steps)
        window, condition = settings.window, self.condition(batch, settings.guidance)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            with lora_at(self.module, float(sigma), settings.lora_window):
                return self.host.velocity(x, sigma, condition)

        return flow_match.sample(
            velocity,
            noise,
            sigmas[start : end + 1],
            rule="ode" if window is None else settings.rule,
            eta=None if window is None else settings.eta,
            window=None if window is None else (window[0] - start, window[1] - start),
            generator=generators,
            callback=callback,
            record=True,
            storage_dtype=settings.storage_dtype,
        )

    def level_range(
        self, steps: int, window: tuple[int, int], height: int, width: int
    ) -> tuple[float, float]:
        """The sigmas at the window's start and end."""
        sigmas = schedule.sigmas(steps, seq_len=schedule.token_count(height, width))
        return float(sigmas[window[0]]), float(sigmas[window[1]])
