"""ComfyUI's half of the outpainting methods: one `Piece` painted by any MODEL and VAE.

Imported at run time only, from a node. The model is told of the hole in its own way (FLUX Fill, inpainting
models, glid); one that cannot be told keeps what is known by a noise mask. Equal to `repaint.py` on the
same weights and seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import latent_preview
import torch
from torch import Tensor
from torch.nn import functional as F

from ..samplers import schedule
from ..samplers.comfy_tiles import TiledSampler
from . import glid
from .outpaint import Piece
from .repaint import LARGEST_SEED, late_steps

AUTO = "auto"
CELL = 8
BLEND = 32  # px over which a window fades into what earlier ones painted


def kind_of(model: Any) -> str:
    """How a MODEL is told of a hole: fill, inpaint (mask and masked image), glid, or plain (not at all)."""
    inner = model.model
    if getattr(inner, "concat_keys", ()):
        return "inpaint"
    if isinstance(inner, comfy.model_base.SD15_instructpix2pix):
        return "glid"
    channels = inner.model_config.unet_config.get("in_channels", 0)
    return "fill" if channels > 2 * inner.latent_format.latent_channels else "plain"


@dataclass
class Repainter:
    """A callable Piece -> image [B,h,w,3]; positive and negative are CONDITIONINGs."""

    model: Any
    positive: list
    negative: list
    vae: Any
    sampler: Any
    scheduler: str = AUTO
    seed: int = 0
    steps: int = 20
    cfg: float = 1.0
    denoise: float = 1.0

    def __call__(self, piece: Piece) -> Tensor:
        kind = kind_of(self.model)
        hard = (piece.mask >= 0.5).float()
        cells = F.max_pool2d(hard[:, None], CELL)
        latents = self._encoded(piece.image[..., :3])
        values = self._told(kind, piece.image, hard, cells)
        noise_mask = cells if kind == "plain" else None
        if piece.cells is not None:
            noise_mask = piece.cells[:, None].float()
        noise = comfy.sample.prepare_noise(latents, (self.seed + piece.seed) % LARGEST_SEED)
        size = latents.shape[-2:]
        sampler = self.sampler
        if piece.window is not None:
            sizes = {"window": piece.window, "stride": piece.stride or piece.window // 2, "blend": BLEND}
            sampler = TiledSampler(sampler, **sizes, order=piece.order, known="keep", mask=hard)
            size = [min(side, piece.window // CELL) for side in size]
        made = comfy.sample.sample_custom(
            self.model,
            noise,
            self.cfg,
            sampler,
            self._sigmas(size),
            _with_values(self.positive, values),
            _with_values(self.negative, values),
            latents,
            noise_mask=noise_mask,
            callback=latent_preview.prepare_callback(self.model, self.steps),
            seed=(self.seed + piece.seed) % LARGEST_SEED,
        )
        return self.vae.decode(made).float().cpu()

    def _encoded(self, image: Tensor) -> Tensor:
        """Latents. Raises ValueError for a VAE of another model, before anything is sampled."""
        latents = self.vae.encode(image)
        channels = self.model.model.latent_format.latent_channels
        wanted = (channels, image.shape[1] // CELL, image.shape[2] // CELL)
        if tuple(latents.shape[1:]) != wanted:
            raise ValueError(
                f"vae makes latents of {'x'.join(map(str, latents.shape[1:]))} where the model takes"
                f" {'x'.join(map(str, wanted))}: connect the model's own VAE."
            )
        return latents

    def _told(self, kind: str, image: Tensor, hard: Tensor, cells: Tensor) -> dict:
        """What goes into the conditionings: masked image and mask, in the model's own form."""
        if kind == "plain":
            return {}
        if kind == "glid":
            known = glid.known_latents(self.vae.encode, image[..., :3], hard.expand(len(image), -1, -1))
            scale = self.model.model.latent_format.scale_factor
            return {"concat_latent_image": glid.image_embed(*known, scale)}
        gray = torch.lerp(image[..., :3], torch.tensor(0.5), hard[..., None].expand_as(image[..., :3]))
        if kind == "inpaint":  # whole cells, so that core's bilinear reduction finds just these
            hard = cells[:, 0].repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
        return {"concat_latent_image": self.vae.encode(gray), "concat_mask": hard[:, None]}

    def _sigmas(self, size) -> Tensor:
        """The noise levels for latents of `size`; auto is FLUX's for its tokens, else evenly spaced steps."""
        sampling = self.model.get_model_object("model_sampling")
        total = schedule.total_steps(self.steps, self.denoise)
        scheduler = self.scheduler
        if scheduler == AUTO:
            if isinstance(self.model.model, comfy.model_base.Flux):
                return schedule.sigmas(self.steps, seq_len=schedule.token_count(*size), denoise=self.denoise)
            if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
                times = late_steps(self.steps, self.denoise).timesteps
                return torch.cat([sampling.sigmas.cpu()[times], torch.zeros(1)])
            scheduler = "simple"
        return comfy.samplers.calculate_sigmas(sampling, scheduler, total)[-self.steps - 1 :].cpu()


def _with_values(conditioning: list, values: dict) -> list:
    return [[embedding, {**options, **values}] for embedding, options in conditioning]
