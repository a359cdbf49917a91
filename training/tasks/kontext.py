"""FLUX.1 Kontext: the source image as further tokens with index 1; the loss is on the target only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.preprocess import Preprocessed
from .flux import FluxTask


class KontextTask(FluxTask):
    """Makes the edited image from a reference image, or an image from text alone."""

    name = "kontext"
    denoiser_input = (64, "FLUX.1 Kontext")
    lora_base = "FLUX.1"
    # diffusers' Kontext example: attention and feed-forward of both streams.
    target_modules = (
        r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)",
        r"single_transformer_blocks\.\d+\.(proj_mlp|attn\.to_[qkv])",
    )

    def host_class(self) -> type:
        """`models.flux_kontext.FluxKontext`."""
        from ...models.flux_kontext import FluxKontext

        return FluxKontext

    @torch.no_grad()
    def encode_images(self, rows: list[Preprocessed]) -> dict[str, Tensor]:
        """`latents` and, where the rows have a reference image, `references` [B,16,h,w]."""
        out = {"latents": self.latents(torch.stack([r.pixels for r in rows]))}
        if rows[0].reference is not None:
            out["references"] = self.latents(torch.stack([r.reference for r in rows]))
        return out | self.encode_touched(rows)

    def condition(self, batch: dict[str, Any], guidance: float | Tensor) -> Any:
        """Text and the reference's tokens, if there is one."""
        from ...models.denoiser import Condition

        tokens = ids = None
        if "references" in batch:
            tokens, ids = self.host.place([batch["references"]])
        return Condition(
            text=self.text(batch),
            guidance=self.host.guidance_tensor(guidance, len(batch["latents"])),
            references=tokens,
            reference_ids=ids,
        )
