"""Schedules on one scale: against diffusers' own schedulers and the closed form."""

import math

import pytest
import torch
from comfyui_diptych.models.inspect import schedules
from comfyui_diptych.nodes.inspect import DiptychSchedulePlot


def test_ddim_shares_are_those_of_diffusers():
    from diffusers import DDIMScheduler

    reference = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
    )
    reference.set_timesteps(20)
    run, *_ = schedules.compared(20, 512, 512)
    alphas = reference.alphas_cumprod[reference.timesteps]
    noise_to_image = ((1 - alphas) / alphas).sqrt()
    torch.testing.assert_close(run.shares[:-1], noise_to_image / (1 + noise_to_image))


def test_flow_shares_are_diffusers_sigmas_with_the_shift_of_the_token_count():
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler

    reference = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (64 * 32 - 256)
    reference.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=mu)
    _, plain, shifted = schedules.compared(8, 512, 1024)
    torch.testing.assert_close(shifted.shares, reference.sigmas)
    torch.testing.assert_close(plain.shares, torch.linspace(1, 0, 9))
    assert f"shift {math.exp(mu):.3g} of 2048 tokens (1024 x 512)" in shifted.name


def test_a_share_of_stable_diffusions_sigmas_is_that_of_its_alphas():
    alphas = torch.tensor([0.01, 0.5, 0.99])
    sigmas = ((1 - alphas) / alphas).sqrt()
    torch.testing.assert_close(schedules.given_share(sigmas), schedules.ddpm_share(alphas))
    late = torch.tensor([0.5, 0.0])
    assert torch.equal(schedules.given_share(late), late)
    torch.testing.assert_close(schedules.given_share(late, "eps"), torch.tensor([1 / 3, 0.0]))


def test_the_node_takes_the_latents_size_and_the_connected_schedules():
    own = torch.tensor([14.0, 1.0, 0.0])
    image, report = DiptychSchedulePlot().plot(
        4, 1024, 1024, latent={"samples": torch.zeros(1, 16, 8, 17)}, sigmas_2=own
    )["result"]
    assert "36 tokens (136 x 64)" in report and "sigmas_1, 2 steps: 1 of 2 steps" in report
    assert "0.933 0.500 0.000" in report
    assert image.shape[0] == 1 and image.shape[2:] == (960, 3) and image.dtype == torch.float32
    other = DiptychSchedulePlot().plot(4, 1024, 1024)["result"][0]
    assert not torch.equal(image, other)


@pytest.mark.parametrize("sigmas", [torch.zeros(0), torch.zeros(1), torch.zeros(2, 2)])
def test_a_schedule_without_a_step_is_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas_1 has shape"):
        schedules.compared(4, 64, 64, [(sigmas, "auto")])
