"""FluxKontext on diffusers modules is FluxKontextPipeline; further references are placed as ComfyUI does."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.models.editing import Sampling, edit_with_kontext
from comfyui_diptych.models.flux_kontext import FluxKontext, reference_positions

PROMPTS = ["make the sky red", "remove the cat but turn the dog into blue"]
TOLERANCE = 1e-5
CASES = [(32, 64, 1, 1), (48, 32, 2, 4), (64, 64, 2, 28), (16, 16, 1, 3)]


@pytest.fixture(scope="session")
def kontext(kontext_pipeline):
    return FluxKontext.from_pipeline(kontext_pipeline)


def reference(pipeline, image, prompts, steps, seed, **kwargs):
    height, width = image.shape[1:3]
    result = pipeline(
        prompt=prompts,
        image=image.movedim(-1, 1),
        height=height,
        width=width,
        max_area=height * width,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        output_type="pt",
        _auto_resize=False,
        **kwargs,
    )
    return result.images.movedim(1, -1)


@pytest.mark.parametrize(("height", "width", "batch", "steps"), CASES)
def test_kontext_equals_the_pipeline(kontext, kontext_pipeline, random_image, height, width, batch, steps):
    image = random_image(batch, height, width)
    expected = reference(kontext_pipeline, image, PROMPTS[:batch], steps, seed=7, guidance_scale=2.5)
    ours = edit_with_kontext(kontext, image, PROMPTS[:batch], panel_width=0, sampling=Sampling(steps, seed=7))
    assert ours.image.std() > 0.05
    assert (ours.image - expected).abs().max() <= TOLERANCE


def test_classifier_free_guidance_equals_the_pipelines_true_cfg(kontext, kontext_pipeline, random_image):
    image = random_image(2, 32, 48)
    expected = reference(
        kontext_pipeline, image, PROMPTS, 3, 1, negative_prompt=["blue dog"] * 2, true_cfg_scale=3.0
    )
    ours = edit_with_kontext(
        kontext,
        image,
        PROMPTS,
        guidance=3.5,
        negative="blue dog",
        cfg=3.0,
        panel_width=0,
        sampling=Sampling(3, seed=1),
    )
    assert (ours.image - expected).abs().max() <= TOLERANCE


def test_without_references_it_is_text_to_image(kontext, kontext_pipeline):
    expected = kontext_pipeline(
        prompt=PROMPTS[0],
        height=32,
        width=48,
        max_area=32 * 48,
        num_inference_steps=1,
        guidance_scale=2.5,
        latents=torch.zeros(1, 6, 64),
        max_sequence_length=kontext_pipeline.tokenizer_2.model_max_length,
        output_type="pt",
    ).images.movedim(1, -1)
    condition = kontext.condition(kontext.encode_text(PROMPTS[0]))
    with torch.no_grad():
        x = torch.zeros(1, 16, 4, 6)
        ours = kontext.decode(x - kontext.velocity(x, 1.0, condition))
    assert (ours - expected).abs().max() <= TOLERANCE


def test_references_of_different_sizes_and_batches_join_the_sequence(kontext, random_image):
    condition = kontext.condition(
        kontext.encode_text(PROMPTS), [random_image(2, 32, 32), random_image(1, 16, 48)], method="index"
    )
    assert condition.references.shape == (2, 4 + 3, 64)
    assert condition.reference_ids.tolist() == [
        [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1], [2, 0, 0], [2, 0, 1], [2, 0, 2],
    ]  # fmt: skip
    with torch.no_grad():
        assert kontext.velocity(torch.randn(2, 16, 4, 4), 0.7, condition).shape == (2, 16, 4, 4)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(4, 4)], [(1, 0, 0)]),
        # A second square goes below the first, a third beside both: the plane stays the squarer.
        ([(4, 4), (4, 4)], [(1, 0, 0), (1, 4, 0)]),
        ([(4, 4), (4, 4), (4, 4)], [(1, 0, 0), (1, 4, 0), (1, 0, 4)]),
        ([(2, 8), (2, 8)], [(1, 0, 0), (1, 2, 0)]),
        ([(8, 2), (8, 2)], [(1, 0, 0), (1, 0, 2)]),
    ],
)
def test_offset_placement_tiles_the_plane(sizes, expected):
    assert reference_positions(sizes) == expected


def test_the_default_works_at_a_trained_size_and_returns_the_source_size(kontext, random_image, monkeypatch):
    seen = []
    encode = kontext.encode
    monkeypatch.setattr(
        kontext, "encode", lambda image, **kw: seen.append(image.shape) or encode(image, **kw)
    )
    monkeypatch.setattr(
        "comfyui_diptych.models.geometry.KONTEXT_SIZES", ((64, 32), (48, 48), (32, 64)), raising=True
    )
    edit = edit_with_kontext(kontext, random_image(1, 30, 51), "make the sky red", sampling=Sampling(1))
    assert seen == [(1, 32, 64, 3)]
    assert edit.canvas.shape == (1, 32, 64, 3)
    assert edit.image.shape == (1, 30, 51, 3)


def test_an_unknown_reference_method_is_named():
    with pytest.raises(ValueError, match="reference method is 'beside': choose one of offset, index"):
        reference_positions([(2, 2)], "beside")
