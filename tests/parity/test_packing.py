"""Packing and preprocessing are those of the diffusers pipelines, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_diptych.models import condition, geometry, packing

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


@pytest.mark.parametrize("size", [(32, 48), (64, 16)])
def test_fill_input_equals_the_pipelines_preprocessing(size):
    from diffusers.image_processor import VaeImageProcessor

    generator = torch.Generator().manual_seed(0)
    image, mask = torch.rand(2, *size, 3, generator=generator), torch.rand(2, *size, generator=generator)
    mask[0, :4] = 0.5
    options = {"vae_scale_factor": 16, "vae_latent_channels": 16}
    image_processor = VaeImageProcessor(**options)
    mask_processor = VaeImageProcessor(
        **options, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    theirs = image_processor.preprocess(image.movedim(-1, 1), *size)
    their_mask = mask_processor.preprocess(mask[:, None], *size)
    ours = condition.fill_input(image, mask)
    assert torch.equal(ours.mask, their_mask)
    assert torch.equal(ours.image.movedim(-1, 1) * 2 - 1, theirs)
    assert torch.equal(ours.masked.movedim(-1, 1) * 2 - 1, theirs * (1 - their_mask))


def test_kontext_sizes_are_the_pipelines():
    from diffusers.pipelines.flux import pipeline_flux_kontext as theirs

    assert list(geometry.KONTEXT_SIZES) == list(theirs.PREFERRED_KONTEXT_RESOLUTIONS)


def test_a_stretched_reference_is_the_pipelines_lanczos_to_a_few_levels():
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    y, x = torch.meshgrid(torch.linspace(0, 6, 300), torch.linspace(0, 9, 480), indexing="ij")
    image = torch.stack((y.sin(), x.cos(), (x + y).sin()), dim=-1) / 2 + 0.5
    levels = (image * 255).round().to(torch.uint8)
    ours = condition.reference(levels[None] / 255)
    assert ours.image.shape[1:3] == geometry.kontext_size((300, 480))
    resized = VaeImageProcessor(vae_scale_factor=16).resize(
        Image.fromarray(levels.numpy()), *ours.image.shape[1:3]
    )
    theirs = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).reshape(ours.image.shape) / 255
    assert float((ours.image - theirs).abs().max()) < 3 / 255
