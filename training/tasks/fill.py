"""FLUX.1 Fill and ICEdit: the masked image and the mask beside the noisy latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.preprocess import Preprocessed
from .flux import FluxTask


class FillTask(FluxTask):
    """Repaints an image, or the right half of an ICEdit diptych."""

    name = "fill"
    denoiser_input = (384, "FLUX.1 Fill")
    lora_base = "FLUX.1 Fill"
    # ICEdit's 343 modules: the image stream and the single blocks, not the text stream.
    target_modules = (
        r"x_embedder",
        r"transformer_blocks\.\d+\.(norm1\.linear|attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.2)",
        r"single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[qkv])",
    )

    @property
    def default_template(self) -> str:
        """ICEdit's prompt."""
        from ...models.diptych import ICEDIT_TEMPLATE

        return ICEDIT_TEMPLATE

    def host_class(self) -> type:
        """`models.flux_fill.FluxFill`."""
        from ...models.flux_fill import FluxFill

        return FluxFill

    def encode_images(self, rows: list[Preprocessed]) -> dict[str, Tensor]:
        """As of `encode_masked`."""
        return self.encode_masked(rows)

    def condition(self, batch: dict[str, Any], guidance: float | Tensor) -> Any:
        """Text and, per token, 64 features of the masked image and 256 of the mask."""
        from ...models.denoiser import Condition
        from ...models.packing import pack_latents, pack_mask

        masked = pack_latents(batch["masked_latents"])
        features = torch.cat([masked, pack_mask(batch["mask"].float()).to(masked)], dim=-1)
        return Condition(
            text=self.text(batch),
            guidance=self.host.guidance_tensor(guidance, len(masked)),
            features=features,
        )
