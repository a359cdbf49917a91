"""FluxFill on diffusers modules is FluxFillPipeline, number for number."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from comfyui_diptych.models import denoiser as limits
from comfyui_diptych.models.denoiser import Denoiser
from comfyui_diptych.models.editing import Sampling, edit_with_fill, fill_canvas
from comfyui_diptych.models.flux_fill import FluxFill
from comfyui_diptych.models.sd_inpaint import SDInpaint

PROMPTS = ["make the sky red", "remove the cat but turn the dog into blue"]
TOLERANCE = 1e-5
CASES = [(32, 64, 1, 1), (32, 64, 1, 4), (48, 32, 2, 3), (64, 64, 2, 28), (16, 16, 1, 5)]


@pytest.fixture(scope="session")
def fill(fill_pipeline):
    return FluxFill.from_pipeline(fill_pipeline)


def half_mask(batch: int, height: int, width: int) -> torch.Tensor:
    """Soft random values: both sides cut them at 0.5."""
    mask = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(5))
    mask[:, :, width // 2 :] += 0.4
    return mask.clamp(0, 1)


def reference(pipeline, image, mask, prompts, steps, seed, guidance=30.0):
    height, width = image.shape[1:3]
    result = pipeline(
        prompt=prompts,
        image=image.movedim(-1, 1),
        mask_image=mask[:, None],
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        output_type="pt",
    )
    return result.images.movedim(1, -1)


@pytest.mark.parametrize(("height", "width", "batch", "steps"), CASES)
def test_fill_equals_the_pipeline_with_the_posterior_mode(
    fill, fill_pipeline, random_image, mode_posterior, height, width, batch, steps
):
    image, mask = random_image(batch, height, width), half_mask(batch, height, width)
    expected = reference(fill_pipeline, image, mask, PROMPTS[:batch], steps, seed=7)
    ours = fill_canvas(fill, image, mask, PROMPTS[:batch], sampling=Sampling(steps, seed=7))
    assert ours.std() > 0.05
    assert (ours - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("height", "width", "batch", "steps"), CASES[:3])
def test_fill_equals_the_unpatched_pipeline_when_sampling_the_posterior(
    fill, fill_pipeline, random_image, height, width, batch, steps
):
    image, mask = random_image(batch, height, width), half_mask(batch, height, width)
    expected = reference(fill_pipeline, image, mask, PROMPTS[:batch], steps, seed=3)
    sampling = Sampling(steps, seed=3, posterior="sample")
    ours = fill_canvas(fill, image, mask, PROMPTS[:batch], sampling=sampling)
    assert (ours - expected).abs().max() <= TOLERANCE


def test_one_image_serves_a_batch_of_prompts(fill, fill_pipeline, random_image, mode_posterior):
    image, mask = random_image(1, 32, 48), half_mask(1, 32, 48)
    expected = reference(fill_pipeline, image, mask, PROMPTS, 2, seed=1)
    ours = fill_canvas(fill, image, mask, PROMPTS, sampling=Sampling(2, seed=1))
    assert (ours - expected).abs().max() <= TOLERANCE


def test_a_long_prompt_is_cut_as_in_the_pipeline_and_said(
    fill, fill_pipeline, random_image, mode_posterior, caplog
):
    image, mask, prompt = random_image(1, 32, 32), half_mask(1, 32, 32), "make the sky red but " * 9
    expected = reference(fill_pipeline, image, mask, [prompt], 1, seed=1)
    ours = fill_canvas(fill, image, mask, prompt, sampling=Sampling(1, seed=1))
    assert (ours - expected).abs().max() <= TOLERANCE
    assert "the prompt has 46 tokens; the last 22 are cut off" in caplog.text


def test_masked_pixels_cannot_reach_the_model(fill, random_image):
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 4:30] = 1
    image, other = random_image(1, 32, 32), random_image(1, 32, 32)
    other[:, 8:20, 4:30] = 0.9
    text = fill.encode_text(PROMPTS[0])
    features = [fill.condition(text, x, mask).features for x in (image, other)]
    assert torch.equal(*features)


def test_guidance_and_prompt_change_the_image(fill, random_image):
    image, mask, sampling = random_image(1, 32, 32), torch.ones(1, 32, 32), Sampling(2)
    base = fill_canvas(fill, image, mask, PROMPTS[0], sampling=sampling)
    assert not torch.equal(base, fill_canvas(fill, image, mask, PROMPTS[1], sampling=sampling))
    assert not torch.equal(base, fill_canvas(fill, image, mask, PROMPTS[0], guidance=50, sampling=sampling))


def test_velocity_is_differentiable_in_x_and_weights(fill_pipeline, random_image):
    fill = FluxFill.from_pipeline(fill_pipeline)
    condition = fill.condition(fill.encode_text(PROMPTS), random_image(2, 32, 32), torch.ones(1, 32, 32))
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    weight = fill.transformer.proj_out.weight
    gradients = torch.autograd.grad(
        fill.velocity(x, torch.tensor([0.9, 0.3]), condition).square().sum(), [x, weight]
    )
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_bfloat16_weights_take_and_give_float32_latents(fill, fill_pipeline, random_image):
    half = FluxFill(
        deepcopy(fill_pipeline.transformer).to(torch.bfloat16),
        deepcopy(fill_pipeline.vae).to(torch.bfloat16),
        fill.text,
    )
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    predictions = []
    for model in (fill, half):
        condition = model.condition(
            model.encode_text(PROMPTS[0]), random_image(1, 32, 32), torch.ones(1, 32, 32)
        )
        with torch.no_grad():
            predictions.append(model.velocity(x, 0.5, condition))
            assert model.decode(x).dtype == torch.float32
    assert predictions[1].dtype == torch.float32
    assert (predictions[0] - predictions[1]).abs().mean() < 0.1 * predictions[0].std()


def test_a_condition_repeats_and_selects_as_separate_calls_would(fill, random_image):
    condition = fill.condition(fill.encode_text(PROMPTS), random_image(2, 32, 32), torch.ones(1, 32, 32))
    x = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = fill.velocity(x, 0.5, condition.repeat(2))
        second = fill.velocity(x[2:], 0.5, condition.take([1, 1]))
    assert len(condition.repeat(2)) == 4
    assert torch.allclose(together[2:], second, atol=1e-5)


def test_every_sample_may_have_its_own_sigma_and_guidance(fill, random_image):
    condition = fill.condition(
        fill.encode_text(PROMPTS),
        random_image(2, 32, 32),
        torch.ones(1, 32, 32),
        guidance=torch.tensor([1.0, 30.0]),
    )
    x, sigmas = torch.randn(2, 16, 4, 4), torch.tensor([0.9, 0.2])
    with torch.no_grad():
        together = fill.velocity(x, sigmas, condition)
        apart = [fill.velocity(x[i : i + 1], float(sigmas[i]), condition.take(i)) for i in range(2)]
    assert torch.allclose(together, torch.cat(apart), atol=1e-5)
    with pytest.raises(ValueError, match="sigma has 3 values for a batch of 2"):
        fill.velocity(x, torch.ones(3), condition)


def test_an_edit_comes_back_at_the_source_size(fill, random_image):
    source = random_image(1, 50, 75)
    edit = edit_with_fill(fill, source, "make the sky red", panel_width=32, sampling=Sampling(1))
    assert edit.image.shape == source.shape
    assert edit.canvas.shape == (1, 16, 64, 3)


def test_an_edit_mask_keeps_the_rest_exactly(fill, random_image):
    source, mask = random_image(1, 32, 32), torch.zeros(1, 32, 32)
    mask[:, :16, :16] = 1
    edited = edit_with_fill(
        fill, source, "a cat", edit_mask=mask, panel_width=None, sampling=Sampling(1)
    ).image
    assert torch.equal(edited[mask == 0], source[mask == 0])
    assert not torch.equal(edited[mask == 1], source[mask == 1])


def test_a_saved_folder_loads_with_the_same_result(fill, fill_pipeline, random_image, tmp_path):
    fill_pipeline.save_pretrained(tmp_path)
    loaded = FluxFill.load(tmp_path, torch.float32, "cpu")
    assert isinstance(loaded, Denoiser)
    for part in ("transformer", "vae"):
        saved = getattr(loaded, part).state_dict()
        for name, value in getattr(fill, part).state_dict().items():
            assert torch.equal(value, saved[name]), name
        for parameter in getattr(loaded, part).parameters():
            parameter.data = (
                parameter.data.clone()
            )  # a file's mapping is not aligned: other kernels, other bits
    image, mask = random_image(1, 32, 32), torch.ones(1, 32, 32)
    images = [fill_canvas(model, image, mask, PROMPTS[0], sampling=Sampling(1)) for model in (fill, loaded)]
    assert torch.equal(*images)


@pytest.mark.parametrize(
    ("height", "width", "mask_size", "message"),
    [
        (30, 32, (30, 32), "image is 32x30 pixels: resize or crop it so that both sides divide by 16"),
        (32, 32, (16, 32), "mask is 32x16 but the image is 32x32"),
    ],
)
def test_wrong_sizes_are_named(fill, random_image, height, width, mask_size, message):
    with pytest.raises(ValueError, match=message):
        fill.condition(fill.encode_text("a cat"), random_image(1, height, width), torch.ones(1, *mask_size))


def test_unequal_batches_are_named(fill, random_image):
    with pytest.raises(ValueError, match="a batch of 2 .* 3 samples"):
        fill.condition(fill.encode_text(["a"] * 3), random_image(2, 32, 32), torch.ones(1, 32, 32))


def test_weights_of_another_model_are_refused(kontext_pipeline):
    with pytest.raises(ValueError, match="takes 64 channels per token where FLUX.1 Fill takes 384"):
        FluxFill.from_pipeline(kontext_pipeline)


def counting(function, counts):
    def watched(rows, *arguments, **options):
        counts.append(len(rows))
        return function(rows, *arguments, **options)

    return watched


@pytest.mark.parametrize("generator", [False, True], ids=["mode", "sample"])
def test_a_vae_sees_no_more_pixels_at_a_time_than_it_may(
    fill_pipeline, sd_inpaint_pipeline, random_image, monkeypatch, generator
):
    """And gives what it gives for all at once; a single image is never cut."""
    image = random_image(5, 32, 48)
    for host in (FluxFill.from_pipeline(fill_pipeline), SDInpaint.from_pipeline(sd_inpaint_pipeline)):

        def both(host):
            draw = torch.Generator().manual_seed(0) if generator else None
            latents = host.encode(image, generator=draw)
            return latents, host.decode(latents)

        whole = both(host)
        seen = {"encode": [], "decode": []}
        with monkeypatch.context() as patch:
            for name in seen:
                patch.setattr(host.vae, name, counting(getattr(host.vae, name), seen[name]))
            patch.setattr(limits, "ENCODED_PIXELS", 2 * 32 * 48)
            patch.setattr(limits, "DECODED_PIXELS", 32 * 48 - 1)
            sliced = both(host)
        assert seen == {"encode": [2, 2, 1], "decode": [1] * 5}
        for one, other in zip(whole, sliced, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
