"""Rewards equal hand-written references on tiny random models of the classes they are made for."""

from __future__ import annotations

import math

import pytest
import torch
from comfyui_diptych.training.rewards.clip import ClipImage, ClipModel, ClipText, centre_crop, letterbox
from comfyui_diptych.training.rewards.hps import convert_open_clip
from comfyui_diptych.training.rewards.vision import DinoImage, aesthetic_head

WORDS = ["<|startoftext|>", "<|endoftext|>", "a", "red", "circle", "blue", "square"]


class Tokenizer:
    """Whole words; the call signature of a transformers tokenizer."""

    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        rows = []
        for text in texts:
            ids = [0, *(WORDS.index(word) for word in text.split()), 1][:max_length]
            rows.append(ids + [1] * (max_length - len(ids)))
        ids = torch.tensor(rows)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **tower,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    vision = {**tower, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return ClipModel(CLIPModel(config).eval(), Tokenizer())


@pytest.fixture
def images():
    return torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(1))


def test_clip_text_equals_transformers_logits(clip, images):
    prompts = ["a red circle", "a blue square", "circle"]
    tokens = clip.tokenizer(prompts, "max_length", True, 8, "pt")
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    pixels = ((images - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = clip.model(pixel_values=pixels, **tokens).logits_per_image
    expected = logits.diagonal() / clip.model.logit_scale.exp().detach()
    torch.testing.assert_close(ClipText("x", clip).score(images, prompts), expected, atol=1e-5, rtol=0)


def test_clip_image_of_itself_is_one(clip, images):
    torch.testing.assert_close(ClipImage(clip).score(images, sources=images), torch.ones(3))


def test_crops_match_their_definitions():
    image = torch.zeros(1, 40, 80, 3)
    image[:, :, 20:60] = 1.0
    assert centre_crop(image, 20).shape == (1, 3, 20, 20)
    assert centre_crop(image, 20)[..., 5:15].min() > 0.99
    boxed = letterbox(image, 20)
    assert boxed.shape == (1, 3, 20, 20)
    assert boxed[:, :, :5].abs().max() == 0 and boxed[:, :, 15:].abs().max() == 0


def test_open_clip_conversion_computes_the_same_features(clip, images):
    """Write the tiny model in open_clip's names by the rule of its source, convert back, compare outputs."""
    theirs = {}
    for key, value in clip.model.state_dict().items():
        theirs |= _to_open_clip(key, value, clip.model.state_dict())
    converted = convert_open_clip(theirs | {"attn_mask": torch.zeros(8, 8)})
    for key, value in clip.model.state_dict().items():
        if "position_ids" not in key:
            torch.testing.assert_close(converted[key], value, atol=0, rtol=0)


def _to_open_clip(key, value, state):
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding": "visual.conv1",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
    }
    if key in ("visual_projection.weight", "text_projection.weight"):
        return {"visual.proj" if key.startswith("visual") else "text_projection": value.T}
    if ".encoder.layers." in key:
        tower, rest = key.split(".encoder.layers.")
        number, rest = rest.split(".", 1)
        prefix = ("visual." if tower == "vision_model" else "") + f"transformer.resblocks.{number}."
        if "q_proj" in rest:
            parts = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            return {prefix + "attn.in_proj_" + rest.rsplit(".", 1)[1]: torch.cat(parts)}
        if "k_proj" in rest or "v_proj" in rest:
            return {}
        for ours, other in (
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("self_attn.out_proj", "attn.out_proj"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            rest = rest.replace(ours, other)
        return {prefix + rest: value}
    for ours, other in names.items():
        if key.startswith(ours):
            return {key.replace(ours, other): value}
    return {} if "position_ids" in key else {key: value}


def test_unknown_open_clip_key_is_named():
    with pytest.raises(ValueError, match="mystery"):
        convert_open_clip({"mystery": torch.zeros(1)})


def test_aesthetic_head_is_the_product_of_its_layers():
    generator = torch.Generator().manual_seed(0)
    sizes = {0: (6, 4), 2: (4, 3), 4: (3, 1)}
    state = {}
    for number, (wide, narrow) in sizes.items():
        state[f"layers.{number}.weight"] = torch.randn(narrow, wide, generator=generator)
        state[f"layers.{number}.bias"] = torch.randn(narrow, generator=generator)
    x = torch.randn(5, 6, generator=generator)
    expected = x
    for number in sizes:
        expected = expected @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    torch.testing.assert_close(aesthetic_head(state)(x), expected)


def test_dino_uses_the_class_token(images):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    reward = DinoImage(model, size=32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        a = model(((images - mean) / std).permute(0, 3, 1, 2)).last_hidden_state[:, 0]
        b = model(((images.flip(0) - mean) / std).permute(0, 3, 1, 2)).last_hidden_state[:, 0]
    expected = torch.cosine_similarity(a, b)
    torch.testing.assert_close(reward.score(images, sources=images.flip(0)), expected, atol=1e-5, rtol=0)


def test_yes_no_judge_compares_first_tokens():
    from types import SimpleNamespace

    from comfyui_diptych.training.rewards.vlm import YesNo

    vocabulary = {"yes": 1, "Yes": 2, "no": 3, "No": 4}

    class Inputs(dict):
        def to(self, device):
            return self

    class Processor:
        tokenizer = SimpleNamespace(encode=lambda word, add_special_tokens: [vocabulary[word.strip()]])

        def apply_chat_template(self, messages, add_generation_prompt, tokenize):
            return messages[0]["content"][-1]["text"]

        def __call__(self, text, images, return_tensors):
            assert "make it blue" in text[0] and len(images) == 2
            return Inputs(x=torch.zeros(1))

    class Judge(torch.nn.Module):
        device = "cpu"

        def forward(self, x):
            return SimpleNamespace(logits=torch.tensor([[[9.0] * 5, [0.0, 1.0, 2.0, 0.5, -1.0]]]))

    picture = torch.zeros(1, 8, 8, 3)
    score = YesNo(Judge(), Processor()).score(picture, ["make it blue"], sources=picture)
    yes, no = math.exp(1) + math.exp(2), math.exp(0.5) + math.exp(-1)
    assert score.item() == pytest.approx(yes / (yes + no), rel=1e-6)
