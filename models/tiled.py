"""Painting a canvas of any size by windows, on diffusers modules: FLUX Fill and Stable Diffusion inpainting.

The plan and the loop are `samplers/tiles.py`. A window's condition is cut from that of the canvas: cells that
earlier windows painted are known in the later ones. Equal to the Tiled Sampler node on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..samplers import ddim, tiles
from ..samplers.schedule import sigmas, token_count
from .denoiser import Condition, hard_mask
from .editing import FILL_GUIDANCE, Sampling
from .flux_fill import FluxFill
from .packing import VAE_FACTOR, pack_latents, pack_mask, unpack_latents
from .pixels import as_image
from .sd_inpaint import SDInpaint

Cut = Callable[[tiles.Tile, Tensor, Tensor], Condition]


@torch.no_grad()
def paint(
    denoiser: FluxFill | SDInpaint,
    image: Tensor,
    mask: Tensor,
    prompt: str | Callable[[tiles.Tile], str],
    *,
    sampling: Sampling,
    window: int,
    stride: int | None = None,
    order: str = "outward",
    known: str = "keep",
    blend: int = 32,
    guidance: float = FILL_GUIDANCE,
    negative: str = "",
    cfg: float = 7.5,
    on_tile: Callable[[int, int], None] | None = None,
) -> Tensor:
    """One canvas [1,H,W,3], hole [1,H,W] filled before: the whole IMAGE [1,H,W,3] that the windows make.

    prompt: of every window, or what says each window's own; a Tile's places are in cells of 8 pixels.
    window, stride (half the window by default), blend: pixels, multiples of 8. guidance is Fill's; negative
    and cfg are Stable Diffusion's. The schedule is that of a window's tokens. sampling.callback is called at
    every step, on_tile(index, count) before every window. Raises ValueError for what does not fit.
    """
    stride = stride or window // 2
    for name, value in (("window", window), ("stride", stride), ("blend", blend)):
        if value % VAE_FACTOR:
            raise ValueError(f"{name} is {value} px: use a multiple of {VAE_FACTOR}.")
    if len(as_image(image)) != 1:
        raise ValueError(f"image has {len(image)} items: windows are painted for one canvas at a time.")
    hard = hard_mask(mask, *image.shape[1:3])
    unknown = F.max_pool2d(hard, VAE_FACTOR)[0, 0] > 0
    plan = tiles.plan(unknown, window=window // VAE_FACTOR, stride=stride // VAE_FACTOR, order=order)

    fill = isinstance(denoiser, FluxFill)
    text = denoiser.encode_text("" if callable(prompt) else prompt)
    generator = sampling.generator()
    latents = denoiser.encode(image).float()
    noise = torch.randn(latents.shape, generator=generator)
    if fill:
        condition = denoiser.condition(text, image, mask, guidance=guidance)
        cut = _fill_cut(condition, hard[0, 0], latents)
        run = _fill_run
    else:
        condition = denoiser.condition(text, image, mask, negative=denoiser.encode_text(negative), cfg=cfg)
        cut = _sd_cut(condition)
        run = _sd_run
    left = unknown.clone()
    count = iter(range(len(plan)))

    def window_of(context: Tensor, hole: Tensor, part: Tensor, tile: tiles.Tile) -> Tensor:
        if on_tile is not None:
            on_tile(next(count), len(plan))
        at = (tile.rows, tile.columns)
        painted = (unknown[at] & ~left[at]).to(context.device)
        left[at] = False
        told = cut(tile, painted, context)
        if callable(prompt):
            told = replace(told, text=denoiser.encode_text(prompt(tile)))
        return run(denoiser, told, part, sampling)

    made = tiles.sample(
        window_of, latents, unknown, plan, known=known, blend=blend // VAE_FACTOR, noise=noise
    )
    return denoiser.decode(made).cpu()


def _fill_cut(condition: Condition, hard: Tensor, latents: Tensor) -> Cut:
    """Fill's features of a window: the masked image's latents, and 64 channels of the mask in pixels."""
    masked = unpack_latents(condition.features[..., : 4 * latents.shape[1]], *latents.shape[-2:])

    def cut(tile: tiles.Tile, painted: Tensor, context: Tensor) -> Condition:
        visible = torch.where(painted, context.to(masked), masked[:, :, tile.rows, tile.columns])
        rows, columns = (slice(VAE_FACTOR * s.start, VAE_FACTOR * s.stop) for s in (tile.rows, tile.columns))
        known = painted.repeat_interleave(VAE_FACTOR, 0).repeat_interleave(VAE_FACTOR, 1).to(hard.device)
        told = hard[rows, columns].masked_fill(known, 0)
        features = torch.cat([pack_latents(visible), pack_mask(told[None]).to(visible)], dim=-1)
        return replace(condition, features=features)

    return cut


def _sd_cut(condition: Condition) -> Cut:
    """Stable Diffusion's five extra channels of a window: the mask in cells, and the masked image."""

    def cut(tile: tiles.Tile, painted: Tensor, context: Tensor) -> Condition:
        features = condition.features[:, :, tile.rows, tile.columns]
        known = torch.cat([torch.zeros_like(context[:, :1]), context], dim=1).to(features)
        return replace(condition, features=torch.where(painted, known, features))

    return cut


def _fill_run(denoiser: Any, condition: Condition, noise: Tensor, sampling: Sampling) -> Tensor:
    return sampling.flow(
        lambda x, sigma: denoiser.velocity(x, sigma, condition),
        noise.to(denoiser.device),
        sigmas(sampling.steps, seq_len=token_count(*noise.shape[-2:])),
    )


def _sd_run(denoiser: Any, condition: Condition, noise: Tensor, sampling: Sampling) -> Tensor:
    return ddim.sample(
        lambda x, timestep: denoiser.epsilon(x, timestep, condition),
        noise.to(denoiser.device),
        ddim.schedule(sampling.steps, denoiser.scheduler_config),
        eta=sampling.eta or 0.0,
        window=sampling.window,
        generator=sampling.sde_generator(),
        callback=sampling.callback,
    )
