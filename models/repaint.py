"""The shell's half of the outpainting methods: one `Piece` painted on diffusers modules.

As ComfyUI's KSampler paints it: from the encoded image with noise, latents that are not to change put back at
every step. Equal to `comfy_repaint.py` on the same weights and seed. For the diffusers pipelines' own
tasks, which start from noise alone, see `editing.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..samplers import ddim
from ..samplers.schedule import sigmas, token_count, total_steps
from . import tiled
from .denoiser import Condition, hard_mask
from .editing import FILL_GUIDANCE, Sampling
from .flux_fill import FluxFill
from .glid import paint as glid
from .glid.model import Glid
from .inpaint_masks import latent_mask
from .outpaint import Piece
from .sd_blend import SDBlend

LARGEST_SEED = 2**64


@dataclass(frozen=True)
class Painter:
    """A callable Piece -> image [B,h,w,3] around FLUX Fill, Stable Diffusion (inpainting or plain) or glid.

    `denoise`: below 1 the run starts from the filled image with some noise, in the same number of steps (not
    for windows). `guidance` is Fill's; `negative` and `cfg` are Stable Diffusion's. `sampler`: of
    glid, where it paints a hole whole (`glid.paint`). `on_tile`: see `tiled.paint`.
    """

    denoiser: Any
    prompt: str
    sampling: Sampling = Sampling()
    denoise: float = 1.0
    guidance: float = FILL_GUIDANCE
    negative: str = ""
    cfg: float = 7.5
    sampler: str = "plms"
    on_tile: Callable[[int, int], None] | None = None

    @property
    def _words(self) -> dict[str, Any]:
        return {"guidance": self.guidance, "negative": self.negative, "cfg": self.cfg}

    @torch.no_grad()
    def __call__(self, piece: Piece) -> Tensor:
        sampling = replace(self.sampling, seed=(self.sampling.seed + piece.seed) % LARGEST_SEED)
        if piece.window is not None:
            if isinstance(self.denoiser, SDBlend):
                raise ValueError("windows need a model that knows masks: use sd_inpaint, or direct.")
            if self.denoise != 1:
                raise ValueError(f"denoise is {self.denoise}: windows are painted from noise, give 1.")
            sizes = {"window": piece.window, "stride": piece.stride, "order": piece.order}
            if isinstance(self.denoiser, Glid):
                return self._glid(piece, sampling)
            options = {"sampling": sampling, "on_tile": self.on_tile, **sizes}
            return tiled.paint(self.denoiser, piece.image, piece.mask, self.prompt, **options, **self._words)
        if isinstance(self.denoiser, Glid) and piece.cells is None and self.denoise == 1:
            return self._glid(piece, sampling)
        latents = self.denoiser.encode(piece.image)
        noise = torch.randn(latents.shape, generator=sampling.generator()).to(latents)
        cells = None if piece.cells is None else piece.cells[:, None].to(latents.device)
        if cells is None and isinstance(self.denoiser, SDBlend):  # it knows no mask
            cells = (latent_mask(hard_mask(piece.mask, *piece.image.shape[1:3])) > 0).to(latents.device)
        run = self._flow if isinstance(self.denoiser, FluxFill) else self._diffusion
        made = run(latents, noise, self._condition(piece), cells, sampling)
        return self.denoiser.decode(made).cpu()

    def _glid(self, piece: Piece, sampling: Sampling) -> Tensor:
        report = sampling.callback
        return glid.paint(
            self.denoiser,
            piece.image,
            piece.mask,
            self.prompt,
            negative=self.negative,
            cfg=self.cfg,
            sampler=self.sampler,
            steps=sampling.steps,
            seed=sampling.seed,
            window=piece.window,
            stride=piece.stride,
            order=piece.order,
            callback=None if report is None else lambda i, n, x0: report({"i": i, "denoised": x0}),
            on_tile=self.on_tile,
        )

    def _condition(self, piece: Piece) -> Condition:
        text = self.denoiser.encode_text(self.prompt)
        if isinstance(self.denoiser, FluxFill):
            return self.denoiser.condition(text, piece.image, piece.mask, guidance=self.guidance)
        negative = self.denoiser.encode_text(self.negative)
        return self.denoiser.condition(text, piece.image, piece.mask, negative=negative, cfg=self.cfg)

    def _flow(
        self, latents: Tensor, noise: Tensor, condition: Condition, cells, sampling: Sampling
    ) -> Tensor:
        schedule = sigmas(sampling.steps, seq_len=token_count(*latents.shape[-2:]), denoise=self.denoise).to(
            latents.device
        )

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            if cells is None:
                return self.denoiser.velocity(x, sigma, condition)
            seen = torch.where(cells, x, sigma * noise + (1 - sigma) * latents)
            x0 = seen - sigma * self.denoiser.velocity(seen, sigma, condition)
            return (x - torch.where(cells, x0, latents)) / sigma

        start = schedule[0] * noise + (1 - schedule[0]) * latents
        return sampling.flow(velocity, start, schedule)

    def _diffusion(
        self, latents: Tensor, noise: Tensor, condition: Condition, cells, sampling: Sampling
    ) -> Tensor:
        schedule = late_steps(sampling.steps, self.denoise, self.denoiser.scheduler_config)
        alpha_of = dict(zip(schedule.timesteps.tolist(), schedule.alphas.tolist(), strict=False))

        def noised(alpha: float) -> Tensor:
            return alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise

        def epsilon(x: Tensor, timestep: Tensor) -> Tensor:
            if cells is None:
                return self.denoiser.epsilon(x, timestep, condition)
            alpha = alpha_of[int(timestep)]
            found = self.denoiser.epsilon(torch.where(cells, x, noised(alpha)), timestep, condition)
            kept = (x - alpha**0.5 * latents) / (1 - alpha) ** 0.5
            return torch.where(cells, found, kept)

        return ddim.sample(
            epsilon,
            noised(float(schedule.alphas[0])),
            schedule,
            eta=sampling.eta or 0.0,
            window=sampling.window,
            generator=sampling.sde_generator(),
            callback=sampling.callback,
        )


def late_steps(steps: int, denoise: float = 1.0, config: dict | None = None) -> ddim.Schedule:
    """The last `steps` steps of a DDIM schedule of int(steps / denoise), ending at the image itself.

    As ComfyUI counts `denoise`; its last sigma is 0, so the final alpha is 1.
    """
    whole = ddim.schedule(max(total_steps(steps, denoise), 1), {**(config or {}), "set_alpha_to_one": True})
    steps = min(steps, len(whole))
    return ddim.Schedule(whole.timesteps[-steps:], whole.alphas[-steps - 1 :], whole.prediction_type)
