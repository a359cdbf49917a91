"""Stable Diffusion 1.5 / 2 inpainting as a training task: nine channels, epsilon (or v) targets.

All weights can also be trained from a text-to-image model of four channels, whose input is then widened.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.flux import check_folder, read_config
from ...samplers import ddim
from ...samplers.gaussian import per_sample
from ..data.preprocess import Preprocessed
from . import initial, losses
from .base import Task, component
from .sampling import lora_at


class SDInpaintTask(Task):
    """UNet input: noisy latents 4, mask 1, masked image 4; uniform timesteps of the model's own schedule.

    Predictions are epsilons (or v), times are timesteps, noise levels shares of the training timesteps.
    """

    name = "sd_inpaint"
    denoiser_part = "unet"
    denoiser_input = (9, "SD inpainting")
    pipeline = "StableDiffusionInpaintPipeline"
    lora_base = "Stable Diffusion UNet"
    target_modules = (r".*\.attn[12]\.(to_[qkv]|to_out\.0)",)
    text_parts = ("text_encoder", "tokenizer")

    def load_encoders(self) -> None:
        """Also the scheduler's config, and its cumulative alphas `alpha_bar` [T]."""
        super().load_encoders()
        scheduler = component(self.config.model, "scheduler")
        self.scheduler_config = dict(scheduler.config)
        # Rounded once, so closer to the formula than diffusers' float32 products.
        self.alpha_bar = ddim.alphas_cumprod(self.scheduler_config, torch.float64).float()

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`tokens` [B,77,D] of the CLIP text encoder."""
        tokenizer = self.parts["tokenizer"]
        length = tokenizer.model_max_length
        ids = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return {"tokens": self.parts["text_encoder"](ids.input_ids.to(self.device))[0]}

    def encode_images(self, rows: list[Preprocessed]) -> dict[str, Tensor]:
        """As of `encode_masked`."""
        return self.encode_masked(rows)

    def check_model(self) -> None:
        """Of other widths only what full training can widen (`initial.with_image`)."""
        folder, (channels, what) = Path(self.config.model), self.denoiser_input
        path = folder / self.denoiser_part / "config.json"
        found = read_config(path).get("in_channels") if path.is_file() else channels
        if found != channels and found in initial.SD_INPUTS:
            if self.config.method != "full":
                raise ValueError(
                    f"model folder {folder} has {found} input channels where {what} has {channels}: give "
                    "that model's folder, or train all of this one, which widens its input (method: full)"
                )
            channels = found
        check_folder(self.config.model, self.denoiser_part, channels, what)

    def fitted(self, module: nn.Module) -> nn.Module:
        """As of `initial.with_image`."""
        return initial.with_image(module, self.denoiser_input[0])

    def host_class(self) -> type:
        """`models.sd_inpaint.SDInpaint`."""
        from ...models.sd_inpaint import SDInpaint

        return SDInpaint

    def make_host(self, module: nn.Module) -> None:
        """Wrap the (possibly distributed) UNet as the family's denoiser of `models/`."""
        self.host = self.host_class()(
            self.module,
            self.vae,
            self.parts.get("tokenizer"),
            self.parts.get("text_encoder"),
            scheduler_config=self.scheduler_config,
            device=self.device,
        )
        self.host.unet = module
        if self.config.method == "full":
            self.host.dtype = torch.float32

    def condition(self, batch: dict[str, Any], guidance: float) -> Any:
        """Text and `features`; guidance is that of classifier-free guidance."""
        from ...models.denoiser import Condition, TextEmbedding
        from ...models.inpaint_masks import latent_mask

        image = batch["masked_latents"]
        features = self.features(latent_mask(batch["mask"].float()).to(image), image)
        negative = TextEmbedding(batch["empty_tokens"]) if "empty_tokens" in batch else None
        return Condition(
            text=TextEmbedding(batch["tokens"]), features=features, negative=negative, cfg=guidance
        )

    def features(self, cells: Tensor, image: Tensor) -> Tensor:
        """What goes beside the noisy latents: the mask [B,1,h,w], 1 = repaint, and the masked image
        [B,4,h,w]."""
        return torch.cat([cells, image], dim=1)

    def guided(self, batch: dict[str, Any], text: Callable, guidance: float) -> dict[str, Any]:
        """Adds `empty_tokens` [B,L,D], the empty prompt's text, where it is needed."""
        if guidance == 1:
            return batch
        text = self.encode_text if self.config.train_text_encoder else text
        tokens = text([""])["tokens"].to(self.device, batch["tokens"].dtype)
        return {**batch, "empty_tokens": tokens.expand_as(batch["tokens"])}

    def row_losses(self, batch: dict[str, Any], noise: Tensor, u: Tensor) -> Tensor:
        """Squared error of epsilon (or v) per row [B] (DDPM, arXiv 2006.11239, eq. 14), without guidance."""
        count = len(self.alpha_bar)
        timestep = (u * count).long().clamp_max(count - 1)
        alpha = self.alpha_bar[timestep].to(noise.device)
        kind = self.scheduler_config.get("prediction_type", "epsilon")
        x, target = losses.diffused(batch["latents"], noise, alpha, kind)
        plain = {k: v for k, v in batch.items() if k != "empty_tokens"}
        prediction = self.predict(x, timestep.to(noise.device), plain, 1.0)
        return losses.weighted_mse(prediction, target, self.cells(batch, x), batch.get("weight"))

    # ---------------------------------------------------------------- prediction and sampling

    def _alpha(self, timestep: Tensor) -> Tensor:
        return self.alpha_bar[timestep.cpu()].to(timestep.device)

    def predict(
        self, x: Tensor, time: float | Tensor, batch: dict[str, Any], guidance: float | Tensor
    ) -> Tensor:
        """Epsilon (or v) at (x, timestep)."""
        return self.host.epsilon(x.float(), time, self.condition(batch, guidance))

    def noised(self, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(x, timestep)."""
        timestep = (level * len(self.alpha_bar)).long().clamp_max(len(self.alpha_bar) - 1)
        return losses.diffused(x0, noise, self._alpha(timestep), "epsilon")[0], timestep

    def data_prediction(self, x: Tensor, time: Tensor, prediction: Tensor) -> Tensor:
        """(x - sqrt(1 - a) epsilon) / sqrt(a); for v sqrt(a) x - sqrt(1 - a) v."""
        alpha = per_sample(self._alpha(time), x, "alpha")
        if self.scheduler_config.get("prediction_type") == "v_prediction":
            return alpha.sqrt() * x - (1 - alpha).sqrt() * prediction
        return (x - (1 - alpha).sqrt() * prediction) / alpha.sqrt()

    def data_weight(self, time: Tensor) -> Tensor:
        """sqrt(alpha): at the highest noise an error of epsilon is 15 times as large in the data."""
        return self._alpha(time).sqrt()

    def noise_share(self, time: Tensor) -> Tensor:
        """(1 - a) / a."""
        alpha = self._alpha(time)
        return (1 - alpha) / alpha

    def rollout(self, batch, noise, settings, generators=None, *, steps=None, callback=None):
        """By DDIM, whose eta is 1 (DDPM) by default. Raises ValueError for a part of the schedule."""
        if steps not in (None, (0, settings.steps)):
            raise ValueError("shared_prefix is for flow models: switch it off for sd_inpaint.")
        condition, window = self.condition(batch, settings.guidance), settings.window
        eta = 1.0 if settings.eta is None else settings.eta

        def epsilon(x: Tensor, t: Tensor) -> Tensor:
            level = ddim.noise_level(int(t), self.scheduler_config)
            with lora_at(self.module, level, settings.lora_window):
                return self.host.epsilon(x, t, condition)

        return ddim.sample(
            epsilon,
            noise,
            ddim.schedule(settings.steps, self.scheduler_config),
            eta=0.0 if window is None else eta,
            window=window,
            generator=generators,
            callback=callback,
            record=True,
            storage_dtype=settings.storage_dtype,
        )

    def level_range(
        self, steps: int, window: tuple[int, int], height: int, width: int
    ) -> tuple[float, float]:
        """The shares of the training timesteps at the window's start and end."""
        timesteps = ddim.schedule(steps, self.scheduler_config).timesteps.tolist()
        start, end = (ddim.noise_level(timesteps[index], self.scheduler_config) for index in window)
        return start, end
