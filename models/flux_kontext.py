"""FLUX.1 Kontext on diffusers modules: reference images join the noisy latents as further tokens.

Equal to FluxKontextPipeline on the same weights and noise for one reference (tests/parity); further
references are placed as ComfyUI places them. Not the loop: `samplers/flow_match.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .denoiser import Condition, TextEmbedding, same_batch
from .flux import FluxDenoiser
from .geometry import check_choice
from .packing import image_ids, pack_latents

REFERENCE_METHODS = ("offset", "index")


def reference_positions(
    sizes: Sequence[tuple[int, int]], method: str = "offset"
) -> list[tuple[int, int, int]]:
    """(index, row, column) of each reference's first token; sizes are (height, width) in tokens.

    offset: all have index 1 and tile the plane, each beside or below what is there, whichever keeps the whole
    the squarer (ComfyUI's default). index: reference k has index k and starts at (0, 0).
    """
    check_choice("reference method", method, REFERENCE_METHODS)
    if method == "index":
        return [(number, 0, 0) for number in range(1, len(sizes) + 1)]
    positions, height, width = [], 0, 0
    for h, w in sizes:
        row, column = (0, width) if h + height > w + width else (height, 0)
        positions.append((1, row, column))
        height, width = max(height, row + h), max(width, column + w)
    return positions


class FluxKontext(FluxDenoiser):
    """Denoiser with 64 input channels per token; references follow the noisy tokens in the sequence."""

    in_channels = 64
    name = "FLUX.1 Kontext"

    @staticmethod
    def _pipeline_class() -> Any:
        from diffusers import FluxKontextPipeline

        return FluxKontextPipeline

    @torch.no_grad()
    def condition(
        self,
        text: TextEmbedding,
        references: Tensor | Sequence[Tensor] = (),
        *,
        guidance: float | Tensor = 2.5,
        negative: TextEmbedding | None = None,
        cfg: float = 1.0,
        method: str = "offset",
        generator: torch.Generator | None = None,
    ) -> Condition:
        """Condition on reference images (none at all gives text to image).

        references: one IMAGE [B,H,W,C] in 0..1 or several, each of its own size, sides multiples of 16; each
        may have batch 1. guidance: the embedded guidance (2.5; a number, or one per sample). negative, cfg:
        classifier-free guidance against a negative prompt. method: see `reference_positions`. generator:
        sample the VAE posterior instead of its mode. Raises ValueError for sizes or batches that do not fit.
        """
        references = [references] if isinstance(references, Tensor) else list(references)
        latents = [self.encode(reference, generator=generator) for reference in references]
        tokens, ids = self.place(latents, method) if latents else (None, None)
        batch = max(len(text), tokens.shape[0] if tokens is not None else 1)
        if tokens is not None:
            tokens = same_batch(prompt=text.tokens, reference=tokens)["reference"]
        return Condition(
            text=text.expand(batch),
            guidance=self.guidance_tensor(guidance, batch),
            references=tokens,
            reference_ids=ids,
            negative=negative.expand(batch) if negative is not None else None,
            cfg=cfg,
        )

    @staticmethod
    def place(latents: Sequence[Tensor], method: str = "offset") -> tuple[Tensor, Tensor]:
        """Model-space latents of the references to their tokens [B,R,64] and positions [R,3]."""
        sizes = [(x.shape[-2] // 2, x.shape[-1] // 2) for x in latents]
        ids = []
        for (index, row, column), x in zip(reference_positions(sizes, method), latents, strict=True):
            origin = torch.tensor([0.0, row, column])
            ids.append(image_ids(*x.shape[-2:], index=index) + origin)
        named = {f"reference {i}": pack_latents(x) for i, x in enumerate(latents, start=1)}
        tokens = torch.cat(list(same_batch(**named).values()), dim=1)
        return tokens, torch.cat(ids).to(tokens.device)
