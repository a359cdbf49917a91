"""Any ComfyUI SAMPLER, run window by window over a canvas of any size.

Imported at run time only, from a node. The plan and the loop are `tiles.py`'s; how a conditioning is cut for
a window is `comfy_cut.py`'s.
"""

from __future__ import annotations

import copy

import comfy.samplers
import torch
from torch import Tensor

from ..models.pixels import as_mask, resize_mask
from . import tiles
from .comfy_cut import ConcatParts, cut_entries, entries_of

CELL = 8  # pixels to a latent cell where the model does not say otherwise


class TiledSampler(comfy.samplers.Sampler):
    """A SAMPLER that runs another one in windows; sizes in pixels. Previews show the whole canvas."""

    def __init__(
        self,
        sampler: comfy.samplers.Sampler,
        *,
        window: int,
        stride: int,
        order: str,
        known: str,
        blend: int,
        mask: Tensor | None = None,
    ):
        self.sampler, self.mask = sampler, mask
        self.window, self.stride, self.blend = window, stride, blend
        self.order, self.known = order, known

    def sample(
        self,
        model_wrap,
        sigmas: Tensor,
        extra_args: dict,
        callback,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """ComfyUI's sampler interface: the guider, and latents [B,C,h,w] as the model sees them.

        Raises ValueError for a latent that is no image's, or a window that does not fit.
        """
        if noise.ndim != 4:
            raise ValueError(
                f"the latent has shape {tuple(noise.shape)}: Tiled Sampler is for images, [batch, channels,"
                " height, width]."
            )
        latents = torch.zeros_like(noise) if latent_image is None else latent_image
        parts = [
            ConcatParts.of(model_wrap.inner_model, entry, noise.shape[1])
            for entry in entries_of(model_wrap.conds)
        ]
        unknown = self._unknown(noise, denoise_mask, parts)
        cell = getattr(model_wrap.inner_model.latent_format, "spacial_downscale_ratio", None) or CELL
        plan = tiles.plan(
            unknown,
            window=_cells(self.window, cell, "window"),
            stride=_cells(self.stride, cell, "stride"),
            order=self.order,
        )
        mixes = denoise_mask is not None or not any(part.mask for part in parts)
        run = _Run(
            self.sampler, model_wrap, sigmas, extra_args, callback, disable_pbar, len(plan), latents.clone()
        )
        left = unknown.clone()

        def paint(context: Tensor, hole: Tensor, part_of_noise: Tensor, tile: tiles.Tile) -> Tensor:
            start = torch.where(hole, latents[:, :, tile.rows, tile.columns], context)
            share = hole.float().expand_as(start) if mixes else None
            if share is not None and denoise_mask is not None:
                share = share * denoise_mask[:, :, tile.rows, tile.columns]
            done = run.tile(tile, part_of_noise, start, share, painted=unknown & ~left)
            left[tile.rows, tile.columns] = False
            return done

        return tiles.sample(
            paint,
            latents,
            unknown,
            plan,
            known=self.known,
            blend=self.blend // cell,
            noise=noise,
            callback=lambda index, count, canvas: run.canvas.copy_(canvas),
        )

    def _unknown(self, noise: Tensor, denoise_mask: Tensor | None, parts: list[ConcatParts]) -> Tensor:
        """bool [h,w]: the node's mask, else the latent's noise mask, else the model's own, else all."""
        size = tuple(noise.shape[2:])
        if self.mask is not None:
            cells = resize_mask(as_mask(self.mask), *size) >= 0.5
        elif denoise_mask is not None:
            cells = denoise_mask.amax(dim=1) > 0
        else:
            seen = [part.seen_mask() for part in parts if part.mask]
            cells = seen[0] if seen else torch.ones((1, *size), dtype=torch.bool)
        return cells.any(dim=0).to(noise.device)


def _cells(pixels: int, cell: int, name: str) -> int:
    if pixels % cell:
        raise ValueError(f"{name} is {pixels} px: this model's latents want a multiple of {cell}.")
    return pixels // cell


class _Run:
    """One sampling of the canvas: runs the inner sampler in a window, with everything cut to it."""

    def __init__(
        self, sampler, guider, sigmas, extra_args, callback, disable_pbar, count: int, canvas: Tensor
    ):
        self.sampler, self.guider, self.sigmas, self.extra_args = sampler, guider, sigmas, extra_args
        self.callback, self.disable_pbar = callback, disable_pbar
        self.count, self.index, self.canvas = count, 0, canvas

    def tile(
        self, tile: tiles.Tile, noise: Tensor, start: Tensor, share: Tensor | None, painted: Tensor
    ) -> Tensor:
        guider = copy.copy(self.guider)
        guider.conds = {
            name: cut_entries(entries, tile, painted, self.canvas, self.guider.inner_model)
            for name, entries in self.guider.conds.items()
        }
        extra_args = dict(self.extra_args)
        if extra_args.get("seed") is not None:
            extra_args["seed"] += (
                self.index
            )  # samplers that draw noise of their own draw another for each tile
        done = self.sampler.sample(
            guider, self.sigmas, extra_args, self._report(tile), noise, start, share, self.disable_pbar
        )
        self.index += 1
        return done

    def _report(self, tile: tiles.Tile):
        """ComfyUI's callback, with the step counted over all tiles and the whole canvas to preview."""
        if self.callback is None:
            return None

        def report(step: int, denoised: Tensor, x: Tensor, steps: int) -> None:
            preview = self.canvas.clone()
            preview[:, :, tile.rows, tile.columns] = denoised
            self.callback(self.index * steps + step, preview, preview, self.count * steps)

        return report
