"""Training targets, weights and random streams, against closed forms and torch.distributions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from comfyui_diptych.samplers import ddim
from comfyui_diptych.training.runtime.attention import for_learning
from comfyui_diptych.training.runtime.random_streams import row_noise, row_uniform
from comfyui_diptych.training.tasks import losses
from comfyui_diptych.training.tasks.flux import FluxTask
from comfyui_diptych.training.tasks.moe import load_balance


def test_noised_is_data_at_0_and_noise_at_1_and_the_target_leads_from_one_to_the_other():
    data, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for sigma in (0.0, 0.3, 1.0):
        x, velocity = losses.noised(data, noise, torch.full((2,), sigma))
        assert torch.allclose(x - sigma * velocity, data, atol=1e-6)
        assert torch.allclose(x + (1 - sigma) * velocity, noise, atol=1e-6)


def test_logit_normal_has_the_named_distribution():
    u = (torch.arange(20001, dtype=torch.float64) + 0.5) / 20001
    sigma = losses.sigma_from_uniform(u, "logit_normal", 0.4, 1.3)
    normal = torch.distributions.Normal(0.4, 1.3)
    expected = torch.distributions.TransformedDistribution(normal, torch.distributions.SigmoidTransform())
    inside = slice(10, -10)  # the density's ends are clamped
    assert torch.allclose(expected.cdf(sigma[inside]).double(), u[inside], atol=1e-5)


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none"])
def test_rows_weigh_by_their_sigma_as_in_sd3(scheme):
    pytest.importorskip("diffusers")
    task = FluxTask.__new__(FluxTask)
    task.config = SimpleNamespace(sigmas=("uniform",), loss_weighting=scheme, guidance=1.0)
    task.predict = lambda x, time, batch, guidance: torch.zeros_like(x)
    task.cells = lambda batch, x: None
    sigma, data = torch.rand(9) * 0.9 + 0.05, torch.randn(9, 4, 2, 2)
    rows = task.row_losses({"latents": data}, torch.zeros_like(data), sigma)
    weight = {
        "none": torch.ones_like(sigma),
        "sigma_sqrt": 1 / sigma**2,
        "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
    }[scheme]
    torch.testing.assert_close(rows, weight * data.square().flatten(1).mean(1))


def test_region_weights_select_the_edited_panel_and_keep_the_scale():
    mask = torch.zeros(1, 1, 16, 32)
    mask[..., 16:] = 1
    prediction, target = torch.zeros(1, 4, 2, 4), torch.zeros(1, 4, 2, 4)
    prediction[..., 2:] = 2.0  # error 4 in the edited panel
    prediction[..., :2] = 1.0  # error 1 in the other

    def rows(loss_on, weight=1.0):
        return losses.weighted_mse(prediction, target, losses.region(mask, target, loss_on, weight)).item()

    assert rows("all") == pytest.approx(2.5)
    assert rows("edited") == pytest.approx(4.0)
    assert rows("weighted", 3.0) == pytest.approx((3 * 4 + 1) / 4)


def test_the_edited_cells_weigh_more_and_the_scale_is_kept():
    prediction, target = torch.zeros(1, 4, 2, 4), torch.zeros(1, 4, 2, 4)
    prediction[..., 3] = 2.0  # error 4 in the last of four columns
    touched = torch.zeros(1, 1, 2, 4)
    touched[..., 3] = 1.0

    def rows(cells):
        return losses.weighted_mse(prediction, target, cells).item()

    assert rows(losses.emphasised(None, touched, 5.0)) == pytest.approx(6 * 4 / (3 + 6))
    panel = torch.tensor([1.0, 1.0, 2.0, 2.0]).expand(1, 1, 2, 4)
    assert rows(losses.emphasised(panel, touched, 5.0)) == pytest.approx(7 * 4 / (1 + 1 + 2 + 7))


def test_prior_loss_of_weight_1_is_twice_the_joint_mean_and_of_weight_0_the_instance_mean():
    rows, prior = torch.tensor([1.0, 2.0, 5.0, 8.0]), torch.tensor([False, False, True, True])
    assert losses.total(rows, prior, 1.0).item() == pytest.approx(2 * rows.mean().item())
    assert losses.total(rows, prior, 0.0).item() == pytest.approx(1.5)


def test_load_balance_is_1_when_even_and_grows_to_the_number_of_experts():
    even = torch.eye(4)[torch.arange(16) % 4]
    assert load_balance(even, even).item() == pytest.approx(1.0)
    collapsed = torch.eye(4)[torch.zeros(16, dtype=torch.long)]
    assert load_balance(collapsed, collapsed).item() == pytest.approx(4.0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_diffusion_targets_equal_diffusers(kind):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind
    )
    assert torch.equal(ddim.alphas_cumprod(scheduler.config), scheduler.alphas_cumprod)
    table = ddim.alphas_cumprod(scheduler.config, torch.float64).float()
    assert torch.allclose(table, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    data, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    x, target = losses.diffused(data, noise, scheduler.alphas_cumprod[t], kind)
    assert torch.allclose(x, scheduler.add_noise(data, noise, t), atol=1e-5)
    expected = noise if kind == "epsilon" else scheduler.get_velocity(data, noise, t)
    assert torch.allclose(target, expected, atol=1e-5)


def test_random_streams_depend_on_seed_position_and_use_only():
    one = row_noise(3, [5, 6], (2, 2))
    assert torch.equal(one[1], row_noise(3, [6], (2, 2))[0])
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(row_uniform(3, [5], "drop"), row_uniform(3, [5], "sigma"))
    drops = row_uniform(0, list(range(4000)), "drop") < 0.1
    assert drops.float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_attention_is_written_out_for_short_sequences_only():
    query, key, value = torch.randn(3, 2, 4, 40, 8).requires_grad_().unbind(0)
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    with for_learning(torch.zeros(1, 16, 8, 16)):
        assert not torch.backends.cuda.flash_sdp_enabled()
        written = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert "Flash" in type(fused.grad_fn).__name__ and "Flash" not in type(written.grad_fn).__name__
    torch.testing.assert_close(fused, written, atol=1e-5, rtol=1e-5)
    with for_learning(torch.zeros(1, 16, 64, 64)):
        assert torch.backends.cuda.flash_sdp_enabled()
    with for_learning(torch.zeros(1, 16, 8, 16, device="meta")):
        assert torch.backends.cuda.flash_sdp_enabled()
