"""The multimodal model against what it is made of: FiLM, our own DDIM, BERT, GPT-2, CLIP's loss."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.models import multimodal as mm
from comfyui_diptych.models.multimodal.tokens import caption_ids, text_ids
from comfyui_diptych.samplers import ddim
from torch.nn import functional as F

WORDS = "a small large red blue circle square at the top left right and".split()
CAPTIONS = ["a small red circle", "a large blue square at the top left and a red circle", "a circle"]
PENALTY = 1.3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = mm.GenerativeMultimodalModel.from_preset("tiny", mm.word_tokenizer(WORDS)).eval()
    with torch.no_grad():  # so that greedy captions are not all one word
        model.text_decoder.projection.weight.mul_(20)
        model.text_decoder.gpt2.transformer.wte.weight.mul_(20)
    return model


@torch.no_grad()
def test_the_residual_block_is_the_film_of_the_notes(model):
    """h (1 + scale) + shift, with scale, shift = MLP(cond).chunk(2), between two convolutions."""
    block = model.latent_diffusion.unet.up[0]
    x, film = torch.randn(2, block.in_channels, 7, 7), torch.randn(2, block.time_emb_proj.in_features)
    h = block.conv1(F.silu(block.norm1(x)))
    scale, shift = block.time_emb_proj(F.silu(film))[:, :, None, None].chunk(2, dim=1)
    h = block.conv2(F.silu(block.norm2(h) * (1 + scale) + shift))
    assert torch.allclose(block(x, film), block.conv_shortcut(x) + h, atol=1e-5)


@pytest.mark.parametrize(("steps", "cfg"), [(1, 1.0), (10, 2.0), (25, 1.0)])
@torch.no_grad()
def test_sampling_equals_our_own_ddim(model, steps, cfg):
    diffusion = model.latent_diffusion
    text, noise = model.encode_text(CAPTIONS[:2]), torch.randn(2, 16, 7, 7)
    null = diffusion.null_condition.expand_as(text)
    alphas = diffusion.scheduler.alphas_cumprod.double()
    times = torch.arange(1000, 0, -1000 // steps) - 1
    x = noise.double()
    for t, after in zip(times, [*times[1:], None], strict=True):
        rows = t.expand(2)
        v = diffusion.predict(x.float(), rows, text).double()
        if cfg != 1:
            unguided = diffusion.predict(x.float(), rows, null).double()
            v = unguided + cfg * (v - unguided)
        alpha_next = 1.0 if after is None else alphas[after]
        x = ddim.step(x, v, alphas[t], alpha_next, prediction_type="v_prediction").x_next
    found = diffusion.sample(text, steps, cfg=cfg, noise=noise)
    assert torch.allclose(found, diffusion.denormalise(x.float()), atol=1e-3)


@torch.no_grad()
def test_a_text_embedding_is_the_mean_of_berts_states(model):
    ids, mask = text_ids(model.tokenizer, CAPTIONS, 48)
    found = model.text_encoder(ids, mask)
    for row, caption in enumerate(CAPTIONS):
        alone = model.tokenizer(caption, return_tensors="pt").input_ids
        mean = model.text_encoder.bert(alone).last_hidden_state.mean(dim=1)
        expected = F.layer_norm(model.text_encoder.projection(mean), (128,))
        assert torch.allclose(found[row : row + 1], expected, atol=1e-4)


@torch.no_grad()
def test_the_caption_loss_is_gpt2s_own_behind_the_prefix(model):
    embeddings = torch.randn(3, 128)
    ids, mask = caption_ids(model.tokenizer, CAPTIONS, 48)
    decoder = model.text_decoder
    inputs = torch.cat([decoder.prefix(embeddings), decoder.gpt2.get_input_embeddings()(ids)], dim=1)
    labels = torch.cat([torch.full((3, 4), -100), ids.masked_fill(mask == 0, -100)], dim=1)
    expected = decoder.gpt2(inputs_embeds=inputs, labels=labels).loss
    found = mm.caption_loss(decoder(embeddings, ids), ids, mask)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("penalty", [1.0, PENALTY])
@torch.no_grad()
def test_generation_takes_the_likeliest_token_one_by_one(model, penalty):
    decoder, embeddings, limit = model.text_decoder, torch.randn(4, 128), 12
    end = model.tokenizer.sep_token_id
    found = decoder.generate(embeddings, repetition_penalty=penalty, max_new_tokens=limit)
    for row, embedding in zip(found.tolist(), embeddings, strict=True):
        ids = []
        while len(ids) < limit and end not in ids:
            logits = decoder(embedding[None], torch.tensor([[*ids, end]]))[0, -1]
            for used in set(ids):
                logits[used] *= penalty if logits[used] < 0 else 1 / penalty
            ids.append(int(logits.argmax()))
        assert row == ids + [end] * (len(row) - len(ids))


def test_the_contrastive_loss_is_clips(model):
    from transformers.models.clip import modeling_clip

    image, text = torch.randn(2, 6, 128)
    similarity = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
    clip_loss = getattr(modeling_clip, "clip_loss", None) or modeling_clip.image_text_contrastive_loss
    assert mm.contrastive_loss(image, text, 9.0).item() == pytest.approx(clip_loss(9.0 * similarity).item())


def test_the_denoiser_is_asked_with_the_timesteps_of_diffusers(model):
    """`Timesteps` gives sin and cos of t / 10000^(i/half): the sinusoidal embedding of the notes."""
    waves = model.latent_diffusion.unet.time_waves(torch.tensor([0, 17]))
    half = waves.shape[1] // 2
    angle = 17 / 10000 ** (torch.arange(half) / half)
    assert torch.allclose(waves[1], torch.cat([angle.cos(), angle.sin()]), atol=1e-4)
