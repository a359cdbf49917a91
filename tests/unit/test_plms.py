"""glid's samplers: PLMS equals the repository's own numbers, DDIM equals diffusers."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.samplers import plms

WEIGHT = torch.tensor([0.7, -0.4, 0.9, 0.3])[None, :, None, None]


class Model:
    """eps(x, t) = 0.9 sin(x w + 3 t') + 0.3 x t' with t' = t / 1000: curved in both."""

    def __init__(self):
        self.times = []

    def __call__(self, x, time):
        self.times.append(float(time))
        part = float(time) / 1000
        return 0.9 * torch.sin(x * WEIGHT.to(x) + 3 * part) + 0.3 * x * part


def start():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_plms_is_golden():
    """Numbers of glid-3-xl-stable's own sampler on this model and noise."""
    model = Model()
    made = plms.plms(model, start(), 50)
    golden = torch.tensor([-11.766954, -6.284573, -9.362857, -8.769293])
    torch.testing.assert_close(made[0, :, 0, 0], golden, rtol=0, atol=1e-4)
    assert abs(float(made.mean()) + 1.401051) < 1e-4 and abs(float(made.std()) - 9.614132) < 1e-4
    assert len(model.times) == 59
    assert model.times[:5] == [999.0, 989.0, 989.0, 979.0, 979.0] and model.times[-1] == 0


def test_plms_reports_every_step_and_ends_with_what_it_reported():
    seen = []
    made = plms.plms(Model(), start(), 6, callback=lambda i, n, x0: seen.append((i, n, x0)))
    assert [entry[:2] for entry in seen] == [(i, 6) for i in range(6)]
    assert torch.equal(seen[-1][2], made)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4.5, 1001])
def test_too_few_steps_for_plms_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}: PLMS takes 4 to 1000"):
        plms.plms(Model(), start(), steps)


@pytest.mark.parametrize("steps", [10, 50, 100, 250])
def test_ddim_equals_diffusers(steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    model, x = Model(), start()
    for time in scheduler.timesteps:
        x = scheduler.step(model(x, time), time, x).prev_sample
    torch.testing.assert_close(plms.ddim(Model(), start(), steps), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [300, 45, 0, 2.5])
def test_ddim_counts_that_no_stride_gives_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}: glid's DDIM"):
        plms.ddim(Model(), start(), steps)
