"""Padding by arithmetic: one pad that weighs as many, against FLUX's own attention on every pad."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from comfyui_diptych.models import tiny
from comfyui_diptych.models.denoiser import Condition, TextEmbedding
from comfyui_diptych.models.flux_fill import FluxFill
from comfyui_diptych.training import recipes
from comfyui_diptych.training.tasks import padding
from comfyui_diptych.training.tasks.families import make_task
from hypothesis import given, settings
from hypothesis import strategies as st

LONGEST = 12


@pytest.fixture(scope="module")
def denoiser():
    """The bundled Fill transformer; neither its VAE nor its text encoders are needed."""
    from diffusers import FluxTransformer2DModel

    module = FluxTransformer2DModel.from_pretrained(tiny.folder() / "fill" / "transformer")
    return FluxFill(module.requires_grad_(False).eval(), None, None, max_text_tokens=64)


@settings(max_examples=15, deadline=None)
@given(words=st.lists(st.integers(1, LONGEST), min_size=2, max_size=2), length=st.integers(LONGEST + 1, 60))
def test_merged_pads_act_as_all_of_them(denoiser, words, length):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(64, generator=generator).expand(2, length, 64).clone()
    for row, count in zip(tokens, words, strict=True):
        row[:count] = torch.randn(count, 64, generator=generator)
    pooled, x = torch.randn(2, 64, generator=generator), torch.randn(2, 16, 8, 8, generator=generator)
    features, guidance = torch.randn(2, 16, 320, generator=generator), torch.full((2,), 30.0)

    def velocity(text):
        return denoiser.velocity(x, 0.7, Condition(text, guidance, features))

    short, bias = padding.merged(tokens, torch.tensor(words), torch.full((2,), length))
    assert short.shape[1] == max(words) + 1
    got = velocity(TextEmbedding(short, pooled, bias))
    assert torch.allclose(got, velocity(TextEmbedding(tokens, pooled)), atol=1e-4)
    one = velocity(TextEmbedding(short, pooled))  # without the bias it is another text
    assert not torch.allclose(got, one, atol=1e-3) or length <= max(words) + 1


def test_a_prompt_that_fills_the_encoding_has_no_pad():
    tokens = torch.randn(2, 4, 3)
    short, bias = padding.merged(tokens, torch.tensor([4, 2]), torch.tensor([4, 64]))
    assert torch.equal(short, tokens) and torch.equal(bias[0], torch.zeros(4))
    assert torch.allclose(bias[1], torch.tensor([0.0, 0.0, 31.0, 31.0]).clamp_min(1).log())


def test_pads_that_depend_on_their_place_are_refused():
    alike = torch.ones(1, 6, 3)
    padding.check_alike(alike, torch.tensor([2]))
    with pytest.raises(ValueError, match="leave it empty"):
        padding.check_alike(torch.randn(1, 6, 3), torch.tensor([2]))


def test_the_tiny_encoders_words_are_counted_and_lengths_are_drawn_by_place():
    options = {"task": "fill", "model": str(tiny.folder() / "fill"), "base_dtype": "float32"}
    c = recipes.from_dict({**options, "text_lengths": [64, 512], "guidance": 1.0, "guidance_max": 60.0})
    task = make_task(c)
    task.load_encoders()
    task.load_text()
    prompts = ["remove the red circle", "make the background blue"]
    with torch.no_grad():
        batch = task.encode_text(prompts)
    tokenizer = task.parts["tokenizer_2"]
    assert batch["words"].tolist() == [len(tokenizer(p).input_ids) for p in prompts]
    drawn, again = task.draw(0, list(range(200))), task.draw(0, list(range(100, 200)))
    assert set(drawn["text_lengths"].tolist()) == {64, 512}
    assert 1 <= drawn["guidance"].min() < 5 and 55 < drawn["guidance"].max() <= 60
    assert all(torch.equal(drawn[name][100:], again[name]) for name in drawn)
    assert not torch.equal(drawn["guidance"], task.draw(1, list(range(200)))["guidance"])
