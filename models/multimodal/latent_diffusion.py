"""Diffusion of image latents conditioned on text embeddings: one prediction, its loss, and DDIM sampling.

v-prediction on a cosine schedule (arXiv 2202.00512, 2102.09672). Latents come in and go out as the image
decoder knows them; inside they are normalised by statistics that are stored with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .losses import diffusion_loss
from .unet import ConditionalUNet2D

CONDITION_DROPOUT = 0.1


class LatentDiffusionUNet(nn.Module):
    """Draws latents [B,256,7,7] that belong to text embeddings [B,512]."""

    def __init__(
        self,
        latent_channels: int = 256,
        latent_size: int = 7,
        condition_dim: int = 512,
        num_timesteps: int = 1000,
        *,
        unet: Mapping[str, Any] | None = None,
    ):
        """unet: further arguments of `ConditionalUNet2D`."""
        super().__init__()
        from diffusers import DDIMScheduler

        self.latent_shape = (latent_channels, latent_size, latent_size)
        self.condition_dim = condition_dim
        self.num_timesteps = num_timesteps
        self.unet = ConditionalUNet2D(latent_channels, condition_dim, **(unet or {}))
        self.null_condition = nn.Parameter(torch.zeros(condition_dim))
        self.register_buffer("latent_mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(latent_channels, 1, 1))
        self.scheduler = DDIMScheduler(
            num_train_timesteps=num_timesteps,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            clip_sample=False,
        )

    @torch.no_grad()
    def update_statistics(self, latents: Tensor, momentum: float = 1.0) -> None:
        """Sets mean and deviation of each channel to those of latents [N,C,h,w], N large.

        A momentum below 1 moves them only so far, for latents that still change while the model learns.
        """
        std, mean = torch.std_mean(self._check("latents", latents).float(), dim=(0, 2, 3), correction=0)
        self.latent_mean.lerp_(mean.view_as(self.latent_mean).to(self.latent_mean), momentum)
        self.latent_std.lerp_(std.view_as(self.latent_std).clamp_min(1e-4).to(self.latent_std), momentum)

    def normalise(self, latents: Tensor) -> Tensor:
        """The decoder's latents [B,C,h,w] as the diffusion sees them: mean 0, deviation 1 per channel."""
        return (latents - self.latent_mean) / self.latent_std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undoes `normalise`, [B,C,h,w]."""
        return latents * self.latent_std + self.latent_mean

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """The velocity [B,C,h,w], float32, at normalised noisy latents; loss and sampling both come here.

        timesteps [B]; condition [B,D], never optional: for no text give rows of `null_condition`.
        """
        self._check("latents", latents)
        self._check_condition(condition, len(latents))
        dtype = self.null_condition.dtype
        return self.unet(latents.to(dtype), timesteps, condition.to(dtype)).float()

    def loss(
        self,
        condition: Tensor,
        latents: Tensor,
        *,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity at random times; condition [B,D], latents [B,C,h,w].

        noise [B,C,h,w], timesteps [B] and drop [B] (True: this row sees the null vector) are drawn where not
        given; rows drop out at 10 % in training mode, never in eval mode.
        """
        self._check_condition(condition, len(latents))
        clean = self.normalise(self._check("latents", latents).float())
        rows = len(clean)
        if noise is None:
            noise = torch.randn_like(clean)
        if timesteps is None:
            timesteps = torch.randint(self.num_timesteps, (rows,), device=clean.device)
        if drop is None:
            rate = CONDITION_DROPOUT if self.training else 0.0
            drop = torch.rand(rows, device=clean.device) < rate
        condition = torch.where(drop[:, None], self.null_condition.to(condition), condition)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        velocity = self.scheduler.get_velocity(clean, noise, timesteps)
        return diffusion_loss(self.predict(noisy, timesteps, condition), velocity)

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        num_inference_steps: int = 50,
        *,
        cfg: float = 2.0,
        noise: Tensor | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Latents [B,C,h,w] float32 for text embeddings [B,D], by deterministic DDIM (arXiv 2010.02502).

        cfg: how far to go beyond the null vector's prediction (arXiv 2207.12598); 1 leaves that out. noise:
        what to start from, drawn if None. callback(step, latents as they now promise to end) after each step.
        Raises ValueError for a step count outside 1..num_timesteps.
        """
        if not 1 <= num_inference_steps <= self.num_timesteps:
            raise ValueError(f"num_inference_steps is {num_inference_steps}: give 1 to {self.num_timesteps}")
        self._check_condition(condition, len(condition))
        shape, device = (len(condition), *self.latent_shape), condition.device
        x = torch.randn(shape, device=device) if noise is None else self._check("noise", noise).to(device)
        x = x.float()
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(num_inference_steps, device=device)
        for step, timestep in enumerate(scheduler.timesteps):
            result = scheduler.step(self._guided(x, timestep.expand(len(x)), condition, cfg), timestep, x)
            x = result.prev_sample
            if callback is not None:
                callback(step, self.denormalise(result.pred_original_sample))
        return self.denormalise(x)

    def _guided(self, x: Tensor, timesteps: Tensor, condition: Tensor, cfg: float) -> Tensor:
        if cfg == 1:
            return self.predict(x, timesteps, condition)
        null = self.null_condition.to(condition).expand_as(condition)
        joined = self.predict(torch.cat([x, x]), torch.cat([timesteps] * 2), torch.cat([null, condition]))
        unguided, guided = joined.chunk(2)
        return unguided + cfg * (guided - unguided)

    def _check(self, name: str, latents: Tensor) -> Tensor:
        if latents.ndim != 4 or tuple(latents.shape[1:]) != self.latent_shape:
            expected = ", ".join(map(str, self.latent_shape))
            raise ValueError(f"{name} is {tuple(latents.shape)}: give [B, {expected}]")
        return latents

    def _check_condition(self, condition: Tensor, rows: int) -> None:
        if condition is None or tuple(condition.shape) != (rows, self.condition_dim):
            found = None if condition is None else tuple(condition.shape)
            raise ValueError(
                f"condition is {found} for {rows} latents: give one text embedding each, "
                f"[{rows}, {self.condition_dim}]"
            )
