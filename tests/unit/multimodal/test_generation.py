"""Both directions of generation: seeds, steps, guidance, sampling options; closed forms where they exist."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PROMPTS = ["a red circle", "a blue square"]


def test_a_seed_gives_the_same_images_bit_for_bit_and_another_gives_others(shared):
    first = shared.generate_from_text(PROMPTS, num_inference_steps=3)
    state = torch.random.get_rng_state()
    again = shared.generate_from_text(PROMPTS, num_inference_steps=3, seed=42)
    assert torch.equal(state, torch.random.get_rng_state())
    other = shared.generate_from_text(PROMPTS, num_inference_steps=3, seed=43)
    assert first.shape == (4, 28, 28, 3) and first.dtype == torch.float32
    assert 0 <= first.min() and first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_without_a_seed_images_follow_torch(shared):
    def draw():
        return shared.generate_from_text("a red circle", 1, num_inference_steps=1, seed=None)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


def test_more_prompts_do_not_change_the_images_of_the_first(shared, monkeypatch):
    alone = shared.generate_from_text(PROMPTS[:1], 1, num_inference_steps=2)
    monkeypatch.setattr("comfyui_diptych.models.multimodal.model.BATCH", 2)
    five = shared.generate_from_text(PROMPTS[:1] * 2 + PROMPTS[1:] * 3, 1, num_inference_steps=2)
    assert len(five) == 5
    assert torch.allclose(five[:1], alone, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 10, 100])
def test_any_number_of_steps_gives_finite_images(shared, steps):
    seen = []
    image = shared.generate_from_text(
        "a red circle", 1, num_inference_steps=steps, callback=lambda i, x0: seen.append((i, x0.shape))
    )
    assert image.isfinite().all()
    assert seen == [(i, (1, 4, 7, 7)) for i in range(steps)]


def target(condition):
    """Where the stand-in below leads: a latent that says which text it was told."""
    return condition[:, :4, None, None].expand(-1, -1, 7, 7)


@pytest.fixture
def exact(model):
    """The diffusion with the ideal denoiser for data that is exactly `target(text)`."""
    diffusion = model.latent_diffusion

    def velocity(x, t, condition):
        a = diffusion.scheduler.alphas_cumprod[t][:, None, None, None]
        noise = (x - a.sqrt() * target(condition)) / (1 - a).sqrt()
        return a.sqrt() * noise - (1 - a).sqrt() * target(condition)

    diffusion.unet.forward = velocity
    return diffusion


@pytest.mark.parametrize(("steps", "tolerance"), [(1, 2e-3), (2, 2e-3), (50, 2e-3), (7, 0.1)])
@pytest.mark.parametrize("cfg", [1.0, 2.0, 3.5])
def test_an_ideal_denoiser_is_followed_exactly(exact, steps, tolerance, cfg):
    """All data in one point: the last clean estimate is it, guided to null + cfg (text - null).

    With a count that does not divide 1000, diffusers leaves the noise of timestep 0 in: 0.6 %.
    """
    text = torch.randn(3, 16)
    null = exact.null_condition.detach().expand_as(text)
    expected = exact.denormalise(target(null + cfg * (text - null)))
    found = exact.sample(text, steps, cfg=cfg)
    assert torch.allclose(found, expected, atol=tolerance * cfg)


def test_cfg_one_asks_once_and_only_for_the_text(exact):
    rows = []
    exact.unet.register_forward_hook(lambda _, inputs, out: rows.append(len(inputs[0])))
    exact.sample(torch.randn(2, 16), 3, cfg=1.0)
    exact.sample(torch.randn(2, 16), 3)
    assert rows == [2, 2, 2, 4, 4, 4]


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_ddim_turns_standard_normal_data_by_the_angle_of_the_schedule(model, steps):
    """For data N(0, 1) the velocity is 0, and a step multiplies by cos of the angle it crosses."""
    diffusion = model.latent_diffusion
    diffusion.unet.forward = lambda x, t, condition: torch.zeros_like(x)
    noise = torch.randn(1, 4, 7, 7)
    alphas = diffusion.scheduler.alphas_cumprod.double()
    times = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
    angles = [math.acos(float(alphas[t]) ** 0.5) for t in times] + [0.0]
    factor = math.prod(math.cos(a - b) for a, b in zip(angles, angles[1:], strict=False))
    found = diffusion.normalise(diffusion.sample(torch.zeros(1, 16), steps, noise=noise))
    assert torch.allclose(found, factor * noise, atol=1e-4)


def test_without_diffusion_the_embedding_is_decoded_directly(shared):
    images = shared.generate_from_text(PROMPTS, 2, use_diffusion=False)
    direct = shared.image_decoder(shared.encode_text(PROMPTS)) / 2 + 0.5
    assert torch.equal(images[::2], images[1::2])
    assert torch.allclose(images[::2], direct.clamp(0, 1).movedim(1, -1), atol=1e-6)


def test_half_precision_generates_as_well(model):
    single = model.generate_from_text(PROMPTS, 1, num_inference_steps=4)
    model.to(torch.bfloat16)
    half = model.generate_from_text(PROMPTS, 1, num_inference_steps=4)
    assert half.dtype == torch.float32
    assert (half - single).abs().mean() < 0.05
    assert len(model.generate_from_image(half, 1)) == 2


def test_captions_come_in_the_number_and_length_asked_for(shared, images):
    captions = shared.generate_from_image(images, seed=1)
    assert [len(row) for row in captions] == [3, 3, 3]
    assert len({text for row in captions for text in row}) > 3
    assert not any("[" in text for row in captions for text in row)
    ids = shared.text_decoder.generate(shared.encode_image(images), max_new_tokens=5)
    assert ids.shape[1] <= 5


def test_captions_follow_their_seed_and_leave_torch_alone(shared, images):
    state = torch.random.get_rng_state()
    captions = [shared.generate_from_image(images, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert captions[0] == captions[1] != captions[2]


def test_a_vanishing_temperature_is_greedy(shared, images):
    greedy = shared.generate_from_image(images, 2, temperature=0)
    assert all(row[0] == row[1] for row in greedy)
    assert shared.generate_from_image(images, 2, temperature=1e-4) == greedy
    assert shared.generate_from_image(images, 2, temperature=2.0, top_k=1) == greedy
    plain = shared.generate_text_from_image(shared.encode_image(images))
    assert plain == [row[0] for row in shared.generate_from_image(images, 1, 0, repetition_penalty=1.0)]


def test_the_old_entry_warns_and_forwards(shared, images):
    with pytest.warns(DeprecationWarning, match="call generate_from_text"):
        images = shared.cross_modal_generation(PROMPTS, num_inference_steps=2)
    assert torch.equal(images, shared.generate_from_text(PROMPTS, num_inference_steps=2))
    with pytest.warns(DeprecationWarning, match="call generate_from_image"):
        captions = shared.cross_modal_generation(images, seed=4)
    assert captions == shared.generate_from_image(images, seed=4)


def test_many_images_are_read_in_parts_with_a_seed_each(shared):
    many = torch.rand(20, 28, 28, 3, generator=torch.Generator().manual_seed(1))
    told = []
    captions = shared.generate_from_image(many, 2, seed=2**64 - 1, callback=told.append)
    assert told == [16, 20] and [len(row) for row in captions] == [2] * 20
    assert captions[:16] == shared.generate_from_image(many[:16], 2, seed=2**64 - 1)
    assert captions[16:] == shared.generate_from_image(many[16:], 2, seed=0)
    torch.testing.assert_close(
        shared.similarity(many, ["a red circle"]),
        torch.cat([shared.similarity(row[None], ["a red circle"]) for row in many]),
        rtol=0,
        atol=1e-6,
    )


def test_what_is_transparent_lies_on_white(shared):
    image = torch.rand(1, 28, 28, 4, generator=torch.Generator().manual_seed(2))
    white = image[..., :3] * image[..., 3:] + 1 - image[..., 3:]
    torch.testing.assert_close(shared.pixels(image), shared.pixels(white), rtol=0, atol=1e-6)
