"""Shapes, names and sizes of the multimodal model: those that the notes fix."""

from __future__ import annotations

import inspect

import pytest
import torch
from comfyui_diptych.models import multimodal as mm

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
Model = mm.GenerativeMultimodalModel


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            mm.LatentDiffusionUNet,
            {"latent_channels": 256, "latent_size": 7, "condition_dim": 512, "num_timesteps": 1000},
        ),
        (mm.TextEncoder.forward, {"input_ids": ..., "attention_mask": ...}),
        (mm.ImageDecoder.decode_from_latent, {"latents": ...}),
        (mm.ImageDecoder.get_latent_from_embedding, {"embeddings": ...}),
        (Model.compute_diffusion_loss, {"image_features": ..., "text_features": ...}),
        (Model.generate_image_from_text, {"text_embeddings": ..., "num_inference_steps": 50}),
        (Model.generate_text_from_image, {"image_embeddings": ...}),
        (
            Model.generate_from_text,
            {
                "prompts": ...,
                "num_samples_per_prompt": 2,
                "use_diffusion": True,
                "num_inference_steps": 50,
                "seed": 42,
            },
        ),
        (
            Model.generate_from_image,
            {
                "images": ...,
                "num_captions_per_image": 3,
                "temperature": 0.9,
                "top_k": 50,
                "top_p": 0.9,
                "repetition_penalty": 1.3,
            },
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures_are_those_of_the_notes(function, expected):
    parameters = inspect.signature(function).parameters.values()
    found = {p.name: ... if p.default is p.empty else p.default for p in parameters if p.kind is POSITIONAL}
    found.pop("self", None)
    assert list(found.items()) == list(expected.items())


@pytest.fixture(scope="module")
def plain():
    """The modules with nothing but their defaults, without memory for their weights."""
    with torch.device("meta"):
        return mm.ImageEncoder(), mm.ImageDecoder(), mm.LatentDiffusionUNet()


def test_shapes_are_those_of_the_notes(plain):
    encoder, decoder, diffusion = plain
    pixels = torch.empty(2, 3, 224, 224, device="meta")
    embeddings = encoder(pixels)
    latents = decoder.get_latent_from_embedding(embeddings)
    assert embeddings.shape == (2, 512)
    assert latents.shape == (2, 256, 7, 7)
    assert decoder.projection(embeddings).shape == (2, 256 * 7 * 7)
    assert decoder.decode_from_latent(latents).shape == decoder.decoder(latents).shape == pixels.shape
    assert diffusion.unet(latents, torch.empty(2, device="meta"), embeddings).shape == latents.shape


def test_the_unet_never_leaves_seven_by_seven(shared):
    sizes = set()
    convolutions = [m for m in shared.latent_diffusion.unet.modules() if isinstance(m, torch.nn.Conv2d)]
    hooks = [c.register_forward_hook(lambda _m, _i, out: sizes.add(out.shape[-2:])) for c in convolutions]
    shared.latent_diffusion.sample(torch.randn(1, 16), 1)
    for hook in hooks:
        hook.remove()
    assert sizes == {(7, 7)}


@pytest.mark.parametrize(("name", "low", "high"), [("drawn", 17.45, 17.6), ("full", 45, 55)])
def test_unet_sizes_are_those_of_the_notes(name, low, high):
    architecture = mm.PRESETS[name]
    with torch.device("meta"):
        unet = mm.LatentDiffusionUNet(unet=architecture.unet).unet
    assert low < sum(p.numel() for p in unet.parameters()) / 1e6 < high
    assert (architecture.image_size, architecture.latent_size, architecture.embed_dim) == (224, 7, 512)


def test_the_tiny_preset_is_small_and_keeps_seven_by_seven(tokenizer):
    model = Model.from_preset("tiny", tokenizer)
    assert (model.architecture.image_size, model.architecture.latent_size) == (56, 7)
    assert sum(p.numel() for p in model.parameters()) < 2e6


def test_embeddings_of_both_kinds_have_one_length(shared, images, captions):
    seen, texts = shared.encode_image(images), shared.encode_text(captions)
    assert seen.shape == texts.shape == (3, 16)
    for embeddings in (seen, texts):
        assert torch.allclose(embeddings.norm(dim=1), torch.tensor(4.0), atol=1e-3)


def test_similarity_is_the_cosine(shared, images, captions):
    cosine = torch.nn.functional.cosine_similarity(
        shared.encode_image(images)[:, None], shared.encode_text(captions)[None], dim=2
    )
    found = shared.similarity(images, captions)
    assert torch.allclose(found, cosine, atol=1e-6)
    assert torch.equal(found[:, 0], found[:, 2])


def test_images_of_any_size_lose_their_margins_only(shared):
    image = torch.rand(1, 28, 28, 3)
    wide = torch.cat([torch.zeros(1, 28, 5, 3), image, torch.ones(1, 28, 5, 3)], dim=2)
    assert torch.equal(shared.pixels(wide), image.movedim(-1, 1) * 2 - 1)
    assert shared.pixels(torch.rand(2, 90, 60, 1)).shape == (2, 3, 28, 28)


def test_tokens_come_back_as_the_text(tokenizer):
    text = "a small red circle at the top left, a blue square and a green cross"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("A Small RED circle").input_ids == tokenizer("a small red circle").input_ids
    assert tokenizer.unk_token_id in tokenizer("a purple circle").input_ids


def test_a_long_text_is_cut_with_a_warning(shared, caplog):
    ids, mask = mm.tokens.caption_ids(shared.tokenizer, ["a red circle", "red " * 30], 12)
    assert ids.shape == mask.shape == (2, 12)
    assert mask.sum(1).tolist() == [4, 12]
    assert (ids[0, 3:] == shared.tokenizer.sep_token_id).all() and ids[1, -1] == shared.tokenizer.sep_token_id
    assert "31 tokens; the last 19 are cut off" in caplog.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode_text([]), "prompts is"),
        (lambda m: m.encode_text(["a", None]), "prompts is"),
        (lambda m: m.pixels(torch.rand(3, 28, 28)), "images has shape"),
        (lambda m: m.image_encoder(torch.rand(1, 3, 32, 32)), r"pixels is \(1, 3, 32, 32\)"),
        (lambda m: m.image_decoder.decode_from_latent(torch.rand(1, 4, 8, 8)), r"give \[B, 4, 7, 7\]"),
        (lambda m: m.pairs(torch.rand(2, 28, 28, 3), ["a"]), "captions are 1 but images 2"),
        (lambda m: m(None, "dream"), "stage is 'dream'"),
        (lambda m: m.generate_from_text("a", num_inference_steps=0), "num_inference_steps is 0"),
        (lambda m: m.generate_from_text("a", num_inference_steps=1001), "num_inference_steps is 1001"),
        (lambda m: m.generate_from_text("a", 0), "num_samples_per_prompt is 0"),
        (lambda m: m.generate_from_image(torch.rand(1, 28, 28, 3), temperature=-1), "temperature is -1"),
        (lambda m: m.generate_from_image(torch.rand(1, 28, 28, 3), 0), "num_captions is 0"),
        (lambda m: m.generate_from_image(torch.rand(1, 28, 28, 3), top_p=1.5), "top_p is 1.5"),
        (lambda m: m.generate_from_image(torch.rand(1, 28, 28, 3), top_k=-1), "top_k is -1"),
        (lambda m: m.generate_text_from_image(torch.rand(1, 16), repetition_penalty=0), "penalty is 0"),
        (lambda m: m.generate_text_from_image(torch.rand(1, 16), max_new_tokens=99), "max_new_tokens is 99"),
        (
            lambda m: m.generate_image_from_text(torch.rand(1, 8)),
            r"condition is \(1, 8\)|condition is \(2, 8\)",
        ),
        (lambda m: Model.from_preset("huge"), "preset is 'huge'"),
        (lambda m: mm.Architecture(image_size=60), "image_size is 60"),
        (lambda m: mm.Architecture.from_dict({"depth": 3}), "unknown key depth"),
        (lambda m: mm.ConditionalUNet2D(attention="all"), "attention is 'all'"),
        (lambda m: mm.TextDecoder(m.text_decoder.gpt2, 16, 4, 60), "GPT-2 has 16 positions"),
    ],
)
def test_errors_name_the_input(shared, call, message):
    with pytest.raises(ValueError, match=message):
        call(shared)
