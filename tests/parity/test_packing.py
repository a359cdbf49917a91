"""Our packing is FluxFillPipeline's, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_diptych.models import packing

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipeline():
    """FluxFillPipeline's own methods on an object without weights (its VAE constants made neutral)."""
    from diffusers import FluxFillPipeline

    pipe = object.__new__(FluxFillPipeline)
    pipe.vae_scale_factor = 8
    pipe.vae = SimpleNamespace(config=SimpleNamespace(shift_factor=0.0, scaling_factor=1.0))
    return pipe


@pytest.mark.parametrize("batch, h, w", [(1, 4, 8), (2, 8, 6), (3, 2, 2), (1, 64, 128)])
def test_packing_equals_diffusers(pipeline, batch, h, w):
    generator = torch.Generator().manual_seed(h * w)
    latents = torch.randn(batch, 16, h, w, generator=generator)
    masked = torch.randn(batch, 16, h, w, generator=generator)
    mask = torch.randint(0, 2, (batch, 1, 8 * h, 8 * w), generator=generator).float()

    noise = pipeline._pack_latents(latents, batch, 16, h, w)
    mask_tokens, masked_tokens = pipeline.prepare_mask_latents(
        mask, masked, batch, 16, 1, 8 * h, 8 * w, torch.float32, torch.device("cpu"), None
    )
    expected = torch.cat((noise, masked_tokens, mask_tokens), dim=2)
    ours = packing.fill_features(
        packing.pack_latents(latents), packing.pack_latents(masked), packing.pack_mask(mask)
    )
    assert torch.equal(packing.pack_mask(mask), mask_tokens)
    assert torch.equal(ours, expected)
    assert torch.equal(
        packing.unpack_latents(noise, h, w),
        pipeline._unpack_latents(noise, 8 * h, 8 * w, pipeline.vae_scale_factor),
    )


@pytest.mark.parametrize("h, w", [(4, 8), (10, 6)])
def test_ids_equal_diffusers(pipeline, h, w):
    expected = pipeline._prepare_latent_image_ids(1, h // 2, w // 2, torch.device("cpu"), torch.float32)
    assert torch.equal(packing.image_ids(h, w), expected)
