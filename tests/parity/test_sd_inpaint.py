"""SDInpaint with our DDIM is StableDiffusionInpaintPipeline with diffusers' DDIM."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.models.editing import Sampling, inpaint_sd
from comfyui_diptych.models.sd_inpaint import MaskRule, SDInpaint

PROMPTS = ["make the sky red", "remove the cat"]
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def inpaint(sd_inpaint_pipeline):
    return SDInpaint.from_pipeline(sd_inpaint_pipeline)


@pytest.mark.parametrize("posterior", ["mode", "sample"])
@pytest.mark.parametrize(
    ("height", "width", "batch", "steps", "eta", "strength"),
    [
        (64, 64, 1, 2, 0.0, 1.0),
        (64, 128, 2, 5, 0.0, 1.0),
        (128, 64, 1, 20, 0.0, 1.0),
        (64, 128, 2, 5, 0.0, 0.6),
    ],
)
def test_inpainting_equals_the_pipeline(
    inpaint, sd_inpaint_pipeline, random_image, request, posterior, height, width, batch, steps, eta, strength
):
    if posterior == "mode":
        request.getfixturevalue("mode_posterior")
    image = random_image(batch, height, width)
    mask = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(2))
    expected = sd_inpaint_pipeline(
        prompt=PROMPTS[:batch],
        negative_prompt=["blue"] * batch,
        image=image.movedim(-1, 1),
        mask_image=mask[:, None],
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=7.5,
        eta=eta,
        strength=strength,
        generator=torch.Generator().manual_seed(4),
        output_type="pt",
    ).images.movedim(1, -1)
    ours = inpaint_sd(
        inpaint,
        image,
        mask,
        PROMPTS[:batch],
        negative="blue",
        rule=MaskRule("nearest"),
        strength=strength,
        sampling=Sampling(steps, seed=4, eta=eta, posterior=posterior),
    )
    assert ours.std() > 0.02
    assert (ours - expected).abs().max() <= TOLERANCE


def test_the_unet_sees_latents_mask_and_masked_image_in_that_order(inpaint, random_image, monkeypatch):
    seen = []
    predict = inpaint.unet.forward
    monkeypatch.setattr(inpaint.unet, "forward", lambda x, *a, **k: (seen.append(x), predict(x, *a, **k))[1])
    image, mask = random_image(1, 64, 64), torch.zeros(1, 64, 64)
    mask[:, :, 20:] = 1
    inpaint_sd(inpaint, image, mask, PROMPTS[:1], sampling=Sampling(1, seed=4))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    masked = inpaint.encode(torch.where(mask[..., None] > 0, 0.5, image))
    cells = (torch.arange(8) >= 2).float().expand(1, 1, 8, 8)
    expected = torch.cat([noise, cells, masked], dim=1)
    assert torch.equal(seen[0], expected.repeat(2, 1, 1, 1))  # the negative prompt, then the prompt


def test_strength_that_leaves_no_step_is_refused(inpaint, random_image):
    with pytest.raises(ValueError, match="strength is 0.1, which of 5 steps leaves none: give at least 0.2"):
        inpaint_sd(
            inpaint,
            random_image(1, 64, 64),
            torch.ones(1, 64, 64),
            "a cat",
            strength=0.1,
            sampling=Sampling(5),
        )


def test_epsilon_is_differentiable(inpaint, random_image):
    condition = inpaint.condition(
        inpaint.encode_text("a cat"), random_image(1, 64, 64), torch.ones(1, 64, 64)
    )
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(inpaint.epsilon(x, 500, condition).square().sum(), x)
    assert gradient.abs().sum() > 0


def test_a_base_model_is_refused(sd_inpaint_pipeline):
    from diffusers import UNet2DConditionModel

    base = UNet2DConditionModel.from_config({**sd_inpaint_pipeline.unet.config, "in_channels": 4})
    with pytest.raises(ValueError, match="takes 4 channels but an inpainting model 9"):
        SDInpaint(base, sd_inpaint_pipeline.vae, None, None)
