"""The bundled multimodal model does what docs/multimodal.md says of it, by the checker of the shapes world.

A sample of the held-out scenes behind the figures; the bounds are the least that is asked of the model.
"""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.models import multimodal, tiny
from comfyui_diptych.training.tiny.shapes import read, render_many
from comfyui_diptych.training.tiny.shapes.scenes import COLOURS, KINDS, PLACES, SIZES, single_scenes

N, STEPS = 48, 10
ASKED = "a large blue cross"


@pytest.fixture(scope="module")
def model():
    return multimodal.GenerativeMultimodalModel.from_pretrained(tiny.folder() / "multimodal")


@pytest.fixture(scope="module")
def scenes():
    return single_scenes(3, "test")[:N]


@pytest.fixture(scope="module")
def images(scenes):
    return render_many(scenes, 56)


@pytest.fixture(scope="module")
def drawn(model, scenes):
    return model.generate_from_text([s.caption for s in scenes], 1, True, STEPS, seed=3)


def right(images, scenes):
    return read(images).matches(scenes).float().mean().item()


def test_held_out_images_are_captioned_word_for_word(model, images, scenes):
    said = model.generate_text_from_image(model.encode_image(images))
    assert sum(a == s.caption for a, s in zip(said, scenes, strict=True)) >= 0.97 * N


def test_sampled_captions_stay_exact_and_in_the_grammar_under_a_repetition_penalty(model, images, scenes):
    rows = model.generate_from_image(images, 3, repetition_penalty=1.3, seed=0)
    shapes = {
        f"a {size} {colour} {kind} at the {place}"
        for size in SIZES
        for colour in COLOURS
        for kind in KINDS
        for place in PLACES
    }
    grammar = {f"a {ground} background with {shape}" for ground in COLOURS for shape in shapes}
    assert all(text in grammar for row in rows for text in row)
    assert sum(t == s.caption for row, s in zip(rows, scenes, strict=True) for t in row) >= 0.9 * 3 * N


def test_without_temperature_sampling_is_the_likeliest_caption(model, images):
    cold = model.generate_from_image(images[:8], 2, temperature=1e-4, repetition_penalty=1.0, seed=1)
    greedy = model.generate_text_from_image(model.encode_image(images[:8]))
    assert cold == [[text, text] for text in greedy]


def test_an_image_is_nearest_to_its_own_caption(model, images, scenes):
    similarity = model.similarity(images, [s.caption for s in scenes])
    assert (similarity.argmax(1) == torch.arange(N)).float().mean() >= 0.97


def test_held_out_captions_are_drawn_right_and_better_than_by_the_direct_decoder(model, drawn, scenes):
    direct = model.generate_from_text([s.caption for s in scenes], 1, use_diffusion=False)
    assert right(drawn, scenes) >= max(0.85, right(direct, scenes) - 0.02)


def test_the_checker_is_no_rubber_stamp(images, drawn, scenes):
    others = scenes[1:] + scenes[:1]
    assert right(images, scenes) == 1
    assert right(drawn, others) < 0.05 and right(images, others) < 0.05


def test_a_caption_of_a_drawn_image_is_what_was_asked_for(model, drawn, scenes):
    said = model.generate_text_from_image(model.encode_image(drawn))
    assert sum(a == s.caption for a, s in zip(said, scenes, strict=True)) >= 0.9 * N


def test_a_short_prompt_gives_the_thing_in_different_places_far_more_often_than_chance(model):
    reading = read(model.generate_from_text(ASKED, 16, True, STEPS, seed=0))
    seen = [reading.scene(row).shapes for row in range(16)]
    hits = [s[0] for s in seen if len(s) == 1 and f"a {s[0].size} {s[0].name}" == ASKED]
    assert len(hits) >= 4 and len({shape.place for shape in hits}) > 1
