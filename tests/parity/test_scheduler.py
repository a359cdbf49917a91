"""Schedules and steps equal diffusers' schedulers, the ones its FLUX and SD pipelines run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfyui_diptych.samplers import ddim
from comfyui_diptych.samplers.flow_match import sample
from comfyui_diptych.samplers.schedule import dynamic_mu, sigmas
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

FLUX = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def flux_scheduler(steps, **options):
    """As FluxPipeline and FluxFillPipeline set it up."""
    mu = options.pop("mu", None)
    scheduler = FlowMatchEulerDiscreteScheduler(**FLUX, **options)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler


def wave(x, t):
    return torch.sin(3 * x + float(t))


@pytest.mark.parametrize("seq_len", [16, 256, 1024, 2048, 4096, 8192, 16384])
def test_mu_equals_calculate_shift(seq_len):
    assert dynamic_mu(seq_len) == pytest.approx(calculate_shift(seq_len), abs=1e-12)


@pytest.mark.parametrize("seq_len", [32, 1024, 2048, 8192])
def test_dynamic_schedules_equal_diffusers(seq_len):
    for steps in [*range(1, 61), 100, 333, 1000]:
        theirs = flux_scheduler(steps, use_dynamic_shifting=True, mu=calculate_shift(seq_len)).sigmas
        torch.testing.assert_close(sigmas(steps, seq_len=seq_len), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
def test_fixed_schedules_equal_diffusers(shift):
    for steps in [*range(1, 61), 100, 333, 1000]:
        theirs = flux_scheduler(steps, shift=shift).sigmas
        torch.testing.assert_close(sigmas(steps, shift=shift), theirs, rtol=0, atol=1e-6)
        if shift == 1.0:
            torch.testing.assert_close(sigmas(steps), theirs, rtol=0, atol=1e-6)


def test_the_ode_equals_diffusers_step_by_step():
    noise = torch.randn(2, 16, 4, 8, generator=torch.Generator().manual_seed(0))
    scheduler = flux_scheduler(12, use_dynamic_shifting=True, mu=calculate_shift(1024))
    theirs, seen = noise, []
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        seen.append(theirs)
        theirs = scheduler.step(wave(theirs, sigma), t, theirs).prev_sample
    ours = []
    end = sample(wave, noise, scheduler.sigmas, callback=lambda state: ours.append(state["x"]))
    assert all(torch.equal(a, b) for a, b in zip(ours, seen, strict=True))
    assert torch.equal(end, theirs)
    torch.testing.assert_close(sample(wave, noise, sigmas(12, seq_len=1024)), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        SD15,
        {**SD15, "set_alpha_to_one": True},
        {**SD15, "timestep_spacing": "trailing"},
        {**SD15, "beta_schedule": "linear", "prediction_type": "v_prediction"},
    ],
    ids=["sd15", "alpha to one", "trailing", "linear v"],
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_equals_diffusers_step_by_step(config, eta):
    steps = 20
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    ours = ddim.schedule(steps, scheduler.config)
    assert torch.equal(ours.timesteps, scheduler.timesteps)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        prediction = wave(x, t / 1000)
        theirs = scheduler.step(prediction, t, x, eta=eta, variance_noise=noise if eta else None)
        result = ddim.step(
            x,
            prediction,
            ours.alphas[i],
            ours.alphas[i + 1],
            eta=eta,
            noise=noise,
            prediction_type=ours.prediction_type,
        )
        torch.testing.assert_close(result.x_next, theirs.prev_sample, rtol=0, atol=2e-6)
        torch.testing.assert_close(result.x0, theirs.pred_original_sample, rtol=1e-5, atol=1e-5)
        x = theirs.prev_sample


def test_the_ddim_loop_equals_diffusers_but_for_the_noise_of_the_last_step():
    steps, x = 20, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = DDIMScheduler(**SD15)
    scheduler.set_timesteps(steps)
    generator, theirs = torch.Generator().manual_seed(5), x
    for i, t in enumerate(scheduler.timesteps):
        eta = 1.0 if i < steps - 1 else 0.0
        theirs = scheduler.step(wave(theirs, t / 1000), t, theirs, eta=eta, generator=generator).prev_sample
    ours = ddim.sample(
        lambda x, t: wave(x, t / 1000),
        x,
        ddim.schedule(steps, SD15),
        eta=1.0,
        generator=torch.Generator().manual_seed(5),
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
