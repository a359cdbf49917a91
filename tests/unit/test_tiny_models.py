"""The bundled tiny models: small enough, loadable as what they claim to be, and blind to padding."""

from __future__ import annotations

import random

import pytest
import torch
from comfyui_diptych.models import tiny
from comfyui_diptych.training.tiny import shapes, text
from comfyui_diptych.training.tiny.shapes.canvases import DIPTYCH_PROMPT

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")


def _clip_tokenizer():
    return transformers.CLIPTokenizer.from_pretrained(tiny.folder() / "fill" / "tokenizer")


def _t5_tokenizer():
    return transformers.T5TokenizerFast.from_pretrained(tiny.folder() / "fill" / "tokenizer_2")


@pytest.fixture(scope="module")
def t5():
    return transformers.T5EncoderModel.from_pretrained(tiny.folder() / "fill" / "text_encoder_2").float()


def test_all_weights_together_stay_below_20_megabytes():
    """Each content once, as git holds it: several folders have the same VAE and text encoders."""
    contents = {p.read_bytes() for p in tiny.folder().rglob("*") if p.is_file()}
    assert 0 < sum(map(len, contents)) <= 20e6


def test_glid_is_sd_inpainting_but_for_its_unet():
    """So that git and ComfyUI's caches hold one VAE and one text encoder for both."""
    glid, sd = tiny.folder() / "glid", tiny.folder() / "sd_inpaint"
    shared = [
        p.relative_to(glid) for p in glid.rglob("*") if p.is_file() and p.parent.name not in ("unet", "glid")
    ]
    assert len(shared) == 8 and all((glid / p).read_bytes() == (sd / p).read_bytes() for p in shared)
    unet = diffusers.UNet2DConditionModel.from_pretrained(glid / "unet")
    assert unet.config.in_channels == 8


def test_every_word_of_the_world_is_one_token():
    edits = list(shapes.random_edits(0, 300, "train"))
    prompts = [e.instruction for e in edits] + [DIPTYCH_PROMPT + e.target.caption + "." for e in edits]
    t5_tokens, clip_tokens = _t5_tokenizer(), _clip_tokenizer()
    for prompt in prompts:
        assert t5_tokens.unk_token_id not in t5_tokens(prompt).input_ids
    for word in text.words():
        if "-" not in word:
            assert len(clip_tokens(word).input_ids) == 3, word
    assert max(len(t5_tokens(p).input_ids) for p in prompts) <= t5_tokens.model_max_length


def test_the_tokenizers_pad_and_cut_as_the_pipelines_ask():
    for tokens, length in ((_t5_tokenizer(), 512), (_clip_tokenizer(), 77)):
        ids = tokens("make the red circle blue", padding="max_length", max_length=length, truncation=True)
        assert len(ids.input_ids) == length
        assert ids.input_ids[-1] == tokens.pad_token_id


@torch.no_grad()
def test_the_t5_encoder_sees_no_padding_and_all_pads_come_out_alike(t5):
    tokens = _t5_tokenizer()
    prompt = "change the colour of the red circle to blue"
    short, long = (
        t5(tokens(prompt, padding="max_length", max_length=n, return_tensors="pt").input_ids)[0]
        for n in (20, 512)
    )
    words = len(tokens(prompt).input_ids)
    assert torch.allclose(short[:, :words], long[:, :words], atol=1e-5)
    pads = long[:, words:]
    assert (pads - pads[:, :1]).abs().max() < 1e-3 * pads.abs().max()


@torch.no_grad()
def test_word_order_reaches_the_tokens(t5):
    tokens = _t5_tokenizer()
    states = [
        t5(tokens(p, return_tensors="pt").input_ids)[0].sort(dim=1).values
        for p in ("a small red circle and a large blue square", "a small blue circle and a large red square")
    ]
    assert (states[0] - states[1]).abs().max() > 0.1


@torch.no_grad()
def test_the_vae_reconstructs_held_out_scenes():
    vae = diffusers.AutoencoderKL.from_pretrained(tiny.folder() / "fill" / "vae")
    rng = random.Random(11)
    scenes = [shapes.random_scene(rng, "test") for _ in range(40)]
    images = shapes.render_many(scenes)
    latents = vae.encode(images.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
    out = (vae.decode(latents).sample.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)
    assert -10 * (out - images).square().mean().log10() >= 30
    assert shapes.read(out).matches(scenes).float().mean() >= 0.99
    model_space = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(model_space.mean()) < 0.1 and 0.9 < model_space.std() < 1.1
