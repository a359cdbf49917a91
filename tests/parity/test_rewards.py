"""Rewards equal hand-written references on tiny random models of the classes they are made for."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from comfyui_diptych.training.rewards import Context
from comfyui_diptych.training.rewards.clip import (
    CLIP_MEAN,
    CLIP_STD,
    ClipImage,
    ClipModel,
    ClipText,
    centre_crop,
    letterbox,
)
from comfyui_diptych.training.rewards.hps import convert_open_clip, load_hps_clip
from comfyui_diptych.training.rewards.vision import DinoImage, aesthetic_head
from safetensors.torch import load_file

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
    torch.testing.assert_close(
        ClipText("x", clip).score(images, Context(prompts)), expected, atol=1e-5, rtol=0
    )


def test_a_clip_model_in_half_precision_scores_as_the_whole_one(clip, images):
    half = ClipModel(copy.deepcopy(clip.model).half(), clip.tokenizer)
    context = Context(["a red circle"] * len(images))
    scores, whole = (ClipText("x", model).score(images, context) for model in (half, clip))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, whole, atol=2e-3, rtol=0)


def test_clip_image_of_itself_is_one(clip, images):
    torch.testing.assert_close(ClipImage(clip).score(images, Context(sources=images)), torch.ones(3))


def test_crops_match_their_definitions():
    image = torch.zeros(1, 40, 80, 3)
    image[:, :, 20:60] = 1.0
    assert centre_crop(image, 20).shape == (1, 3, 20, 20)
    assert centre_crop(image, 20)[..., 5:15].min() > 0.99
    boxed = letterbox(image, 20)
    assert boxed.shape == (1, 3, 20, 20)
    assert boxed[:, :, :5].abs().max() == 0 and boxed[:, :, 15:].abs().max() == 0


class Ids:
    """The kept token ids as a tokenizer of transformers gives them: filled up with the end."""

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        over = (self.ids == 6).cumsum(1) > 0
        ids = torch.where(over, 6, self.ids)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_hps_weights_give_the_features_that_open_clip_gives(tmp_path):
    """A model of open_clip's own code, its answers made by it and kept (`data/make_open_clip.py`)."""
    stored = load_file(Path(__file__).parent / "data" / "open_clip.safetensors")
    state = {k.removeprefix("state."): v for k, v in stored.items() if k.startswith("state.")}
    torch.save({"state_dict": state}, tmp_path / "tiny.pt")
    tower = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"hidden_act": "gelu", "projection_dim": 8}
    text = {**tower, "vocab_size": 7, "max_position_embeddings": 8, "bos_token_id": 5, "eos_token_id": 6}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    config = {"projection_dim": 8, "text_config": text, "vision_config": vision}
    clip = ClipModel(load_hps_clip(str(tmp_path / "tiny.pt"), config), Ids(stored["asked.tokens"]))
    texts = clip.text_features(["a", "b", "c"])
    torch.testing.assert_close(texts, stored["said.text"], atol=1e-5, rtol=1e-5)
    std, mean = (torch.tensor(values)[:, None, None] for values in (CLIP_STD, CLIP_MEAN))
    images = (stored["asked.pixels"] * std + mean).movedim(1, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "resize", lambda images, size: images.movedim(-1, 1))  # they have its size
        features = clip.image_features(images)
    torch.testing.assert_close(features, stored["said.image"], atol=1e-5, rtol=1e-5)
    assert clip.logit_scale == pytest.approx(stored["state.logit_scale"].exp().item())


def test_a_checkpoint_that_does_not_fill_the_model_is_refused(tmp_path):
    stored = load_file(Path(__file__).parent / "data" / "open_clip.safetensors")
    state = {k.removeprefix("state."): v for k, v in stored.items() if k.startswith("state.")}
    del state["visual.proj"]
    torch.save(state, tmp_path / "tiny.pt")
    small = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": 7, "max_position_embeddings": 8}
    config = {
        "projection_dim": 8,
        "text_config": text,
        "vision_config": {**small, "image_size": 32, "patch_size": 8},
    }
    with pytest.raises(ValueError, match="missing .'visual_projection.weight'"):
        load_hps_clip(str(tmp_path / "tiny.pt"), config)


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
    torch.testing.assert_close(
        reward.score(images, Context(sources=images.flip(0))), expected, atol=1e-5, rtol=0
    )


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

    image = torch.zeros(1, 8, 8, 3)
    score = YesNo(Judge(), Processor()).score(image, Context(["make it blue"], image))
    yes, no = math.exp(1) + math.exp(2), math.exp(0.5) + math.exp(-1)
    assert score.item() == pytest.approx(yes / (yes + no), rel=1e-6)
