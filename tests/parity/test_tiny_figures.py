"""The bundled models do what the README says of them, in diffusers' own pipelines.

A sample of the 500 held-out pairs behind the figures; the bounds leave room for its size.
"""

from __future__ import annotations

import diffusers
import pytest
import torch
from comfyui_diptych.models import diptych, lora, tiny
from comfyui_diptych.models.glid import paint
from comfyui_diptych.models.glid.model import Glid
from comfyui_diptych.models.outpaint import expand, paste_back
from comfyui_diptych.training.tiny import shapes

N = 32
FAST = {"num_inference_steps": 16, "output_type": "pt"}


@pytest.fixture(scope="module")
def pairs():
    return list(shapes.edit_pairs(5, N, "test"))


def stacked(pairs, name):
    return torch.stack([getattr(pair, name) for pair in pairs]).movedim(-1, 1)


def pipeline_of(kind, folder):
    pipeline = kind.from_pretrained(tiny.folder() / folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def success(images, pairs):
    return shapes.edit_success(images.movedim(1, -1), [pair.edit for pair in pairs])["success"].float().mean()


@pytest.mark.parametrize(
    ("adapted", "low", "high"),
    [("", 0.0, 0.2), ("icedit", 0.7, 1.0), ("icedit_rank12_grpo", 0.6, 1.0)],
)
def test_fill_edits_with_an_icedit_lora_only(pairs, adapted, low, high):
    pipeline = pipeline_of(diffusers.FluxFillPipeline, "fill")
    if adapted:
        weights = lora.read(tiny.folder() / f"loras/{adapted}.safetensors")
        lora.apply_to_diffusers(pipeline.transformer, weights, 1.0)
    source = stacked(pairs, "source")
    mask = torch.cat([torch.zeros(N, 1, 64, 64), torch.ones(N, 1, 64, 64)], -1)
    made = pipeline(
        prompt=[diptych.format_prompt(pair.instruction) for pair in pairs],
        image=torch.cat([source, source], -1),
        mask_image=mask,
        height=64,
        width=128,
        guidance_scale=30.0,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(0),
        **FAST,
    ).images
    assert low <= success(made[..., 64:], pairs) <= high


def test_kontext_edits(pairs):
    pipeline = pipeline_of(diffusers.FluxKontextPipeline, "kontext")
    made = pipeline(
        prompt=[pair.instruction for pair in pairs],
        image=stacked(pairs, "source"),
        height=64,
        width=64,
        max_area=64 * 64,
        guidance_scale=2.5,
        max_sequence_length=64,
        _auto_resize=False,
        generator=torch.Generator().manual_seed(0),
        **FAST,
    ).images
    assert success(made, pairs) >= 0.75


def test_sd_inpainting_paints_what_the_caption_says(pairs):
    pipeline = pipeline_of(diffusers.StableDiffusionInpaintPipeline, "sd_inpaint")
    holes = [(shapes.PLACES[n % 4], shapes.PLACES[(n + 1) % 4])[: 1 + n % 2] for n in range(N)]
    made = pipeline(
        prompt=[pair.caption for pair in pairs],
        image=stacked(pairs, "target"),
        mask_image=shapes.place_masks(holes)[:, None],
        height=64,
        width=64,
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(0),
        **FAST,
    ).images
    scenes = [pair.edit.target for pair in pairs]
    assert shapes.places_match(made.movedim(1, -1), scenes, holes).float().mean() >= 0.75


def test_glid_paints_the_other_half_as_the_caption_says(pairs):
    """With its own PLMS and guidance; no pipeline of diffusers takes eight channels of this kind."""
    denoiser = Glid.load(tiny.folder() / "glid", torch.float32, "cpu")
    known = stacked(pairs, "target").movedim(1, -1)[:, :, :32].contiguous()
    canvas, mask, layout = expand(known, right=32)
    captions = [pair.caption for pair in pairs]
    made = paint.paint(denoiser, canvas, mask, captions, cfg=2.5, steps=16)
    finished = paste_back(made, known, layout, match_colour=True)
    assert torch.equal(finished[:, :, :32], known)
    scenes = [pair.edit.target for pair in pairs]
    assert shapes.read(finished).matches(scenes).float().mean() >= 0.7
