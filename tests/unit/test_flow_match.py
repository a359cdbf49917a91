"""Each step rule against a derivation of its own: score, posterior, Gaussian marginals, hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from comfyui_diptych.samplers.flow_match import DEFAULT_ETA, RULES, kl, log_prob, step
from comfyui_diptych.samplers.gaussian import log_ratio
from comfyui_diptych.samplers.schedule import sigmas
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

SDE = [rule for rule in RULES if rule != "ode"]
NORMALIZED = [rule for rule in SDE if rule != "cps"]
DATA_MEAN, DATA_STD = 0.8, 0.5

sigma_pairs = st.tuples(st.floats(0.05, 0.99), st.floats(0.01, 0.99)).map(lambda p: (p[0], p[0] * p[1]))


def marginal(sigma):
    """The distribution of x = (1-sigma) data + sigma noise for data ~ N(DATA_MEAN, DATA_STD)."""
    std = math.sqrt((1 - sigma) ** 2 * DATA_STD**2 + sigma**2)
    return Normal(
        torch.tensor((1 - sigma) * DATA_MEAN, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    )


def velocity(x, sigma):
    """E[noise - data | x], by regression of the jointly Gaussian noise, data and x."""
    now = marginal(sigma)
    surprise = (x - now.mean) / now.variance
    return sigma * surprise - (DATA_MEAN + (1 - sigma) * DATA_STD**2 * surprise)


def latents(seed=0, shape=(3, 4, 2, 2)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


@settings(max_examples=40, deadline=None)
@given(sigma_pairs)
@pytest.mark.parametrize("rule", ["flow", "dance"])
def test_flow_and_dance_are_euler_maruyama_steps_of_the_reverse_sde(rule, pair):
    sigma, sigma_next = pair
    x = latents()[0].requires_grad_()
    score = torch.autograd.grad(marginal(sigma).log_prob(x).sum(), x)[0]
    v = velocity(x.detach(), sigma)
    diffusion = {"flow": 0.7 * math.sqrt(sigma / (1 - sigma)), "dance": 0.3}[rule]
    dt = sigma_next - sigma

    result = step(rule, x.detach(), v, sigma, sigma_next, noise=torch.zeros_like(x))

    torch.testing.assert_close(result.mean, x.detach() + (v - diffusion**2 / 2 * score) * dt)
    assert result.std.item() == pytest.approx(diffusion * math.sqrt(-dt))


@settings(max_examples=40, deadline=None)
@given(sigma_pairs)
def test_rf_ancestral_at_eta_one_samples_the_posterior(pair):
    sigma, sigma_next = pair
    x, data, _ = latents()
    v = (x - data) / sigma
    keep = (1 - sigma) / (1 - sigma_next)
    added = sigma**2 - keep**2 * sigma_next**2  # x = keep * x_next + sqrt(added) * fresh noise
    precision = 1 / sigma_next**2 + keep**2 / added
    posterior = ((1 - sigma_next) * data / sigma_next**2 + keep * x / added) / precision

    result = step("rf_ancestral", x, v, sigma, sigma_next, eta=1.0, noise=torch.zeros_like(x))

    torch.testing.assert_close(result.mean, posterior)
    assert result.std.item() == pytest.approx(precision**-0.5)


@settings(max_examples=40, deadline=None)
@given(sigma_pairs, st.floats(0, 1))
def test_cps_and_rf_ancestral_end_with_exactly_the_scheduled_noise(pair, eta):
    sigma, sigma_next = pair
    _, data, noise = latents()
    x, v = (1 - sigma) * data + sigma * noise, noise - data
    for rule in ("cps", "rf_ancestral"):
        result = step(rule, x, v, sigma, sigma_next, eta=eta, noise=torch.zeros_like(x))
        kept_noise = (result.mean - (1 - sigma_next) * data) / noise
        torch.testing.assert_close(
            kept_noise**2 + result.std**2, torch.full_like(x, sigma_next**2), rtol=1e-6, atol=1e-9
        )
    fresh = step("cps", x, v, sigma, sigma_next, eta=eta, noise=torch.zeros_like(x)).std.item()
    assert fresh == pytest.approx(sigma_next * math.cos((1 - eta) * math.pi / 2), abs=1e-9)


@pytest.mark.parametrize(
    ("rule", "mean", "std"),
    [
        ("ode", 0.875, 0.0),
        ("flow", 0.599375, math.sqrt(0.3675)),  # s^2 = .49 * .75/.25 = 1.47
        ("dance", 0.858125, 0.15),
        ("cps", 0.486322, 0.475528),
        ("rf_ancestral", 0.735104, 0.329983),
    ],
)
def test_one_step_by_hand_at_the_published_noise_levels(rule, mean, std):
    x, v = torch.ones(1, 1), torch.full((1, 1), 0.5)
    result = step(rule, x, v, 0.75, 0.5, noise=torch.ones(1, 1))
    assert result.mean.item() == pytest.approx(mean, abs=1e-6)
    assert result.std.item() == pytest.approx(std, abs=1e-6)
    assert result.x_next.item() == pytest.approx(mean + std, abs=1e-6)
    assert result.x0.item() == pytest.approx(0.625)


@pytest.mark.parametrize(
    ("rule", "steps", "published"),
    [
        ("flow", 16, {0: 0.70, 1: 0.72, 2: 0.52, 14: 0.167}),
        ("dance", 16, {0: 0.044, 14: 0.11}),
        ("rf_ancestral", 10, dict(enumerate([0.68, 0.58, 0.50, 0.44, 0.39, 0.35, 0.30, 0.24, 0.16, 0.0]))),
    ],
)
def test_noise_of_a_whole_schedule_is_the_published_one(rule, steps, published):
    schedule, x = sigmas(steps, shift=3.0), torch.zeros(1, 1)
    for i, std in published.items():
        assert step(rule, x, x, *schedule[i : i + 2]).std.item() == pytest.approx(std, abs=0.006)


def final_marginal(rule, steps, dance_leaves_noise=False):
    """Mean and std of the image under an exact model: every step is affine, so they propagate exactly."""
    schedule = sigmas(steps, shift=3.0).double()
    mean, variance = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for sigma, sigma_next in zip(schedule[:-1], schedule[1:], strict=True):
        result = step(rule, probe, velocity(probe, sigma.item()), sigma, sigma_next)
        landing, std = result.mean, result.std
        if rule == "dance" and sigma_next == 0 and dance_leaves_noise:
            noise = probe + (1 - sigma) * velocity(probe, sigma.item())
            landing, std = landing - 0.3**2 / 2 * noise, 0.3 * sigma.sqrt()
        offset, slope = landing[0], landing[1] - landing[0]
        mean, variance = offset + slope * mean, slope**2 * variance + std**2
    return mean.item(), variance.sqrt().item()


@pytest.mark.parametrize(
    ("rule", "at_10_steps", "at_100_steps"),
    [
        ("ode", 0.369, 0.486),
        ("flow", 0.418, 0.492),
        ("dance", 0.385, 0.487),
        ("cps", 0.314, 0.387),
        ("rf_ancestral", 0.355, 0.477),
    ],
)
def test_gaussian_data_comes_out_with_its_mean_and_the_known_std(rule, at_10_steps, at_100_steps):
    """The figures are of 400,000 chains; DanceGRPO's were taken with its last step's noise left in."""
    for steps, std in ((10, at_10_steps), (100, at_100_steps)):
        _, found = final_marginal(rule, steps, dance_leaves_noise=True)
        assert found == pytest.approx(std, abs=2e-3)
        assert final_marginal(rule, steps)[0] == pytest.approx(DATA_MEAN)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "cps"])
def test_many_steps_reach_the_data_distribution(rule):
    assert final_marginal(rule, 1500) == pytest.approx((DATA_MEAN, DATA_STD), abs=3e-3)


@pytest.mark.parametrize("rule", RULES)
def test_the_last_step_never_leaves_noise(rule):
    x, v, noise = latents()
    result = step(rule, x, v, 0.3, 0.0, noise=noise)
    torch.testing.assert_close(result.x_next, x - 0.3 * v)
    assert result.std.item() == 0
    assert torch.equal(result.log_prob, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("rule", SDE)
def test_without_noise_every_rule_is_the_ode(rule):
    x, v, noise = latents()
    result = step(rule, x, v, 0.8, 0.6, eta=0.0, noise=noise)
    torch.testing.assert_close(result.x_next, step("ode", x, v, 0.8, 0.6).x_next)
    assert torch.equal(result.log_prob, torch.zeros(3, dtype=torch.float64))


def test_flow_at_sigma_one_uses_the_second_sigma_in_the_denominator_only():
    x, v, noise = latents()
    std = 0.7 * math.sqrt(1 / (1 - 0.9)) * math.sqrt(0.1)
    assert step("flow", x, v, 1.0, 0.9, noise=noise).std.item() == pytest.approx(std)
    assert step("flow", x, v, 1.0, 0.9, noise=noise, sigma_max=0.9).std.item() == pytest.approx(std)
    other = 0.7 * math.sqrt(1 / (1 - 0.95)) * math.sqrt(0.1)
    assert step("flow", x, v, 1.0, 0.9, noise=noise, sigma_max=0.95).std.item() == pytest.approx(other)
    unaffected = step("flow", x, v, 0.9, 0.8, noise=noise)
    assert torch.equal(step("flow", x, v, 0.9, 0.8, noise=noise, sigma_max=0.5).x_next, unaffected.x_next)


@pytest.mark.parametrize("rule", NORMALIZED)
def test_log_prob_is_the_mean_of_the_normal_density(rule):
    x, v, noise = latents()
    result = step(rule, x, v, 0.8, 0.6, noise=noise)
    expected = Normal(result.mean, result.std).log_prob(result.x_next).flatten(1).mean(1)
    torch.testing.assert_close(result.log_prob, expected)
    torch.testing.assert_close(log_prob(rule, x, result.x_next, v, 0.8, 0.6), expected)


def test_cps_log_prob_is_the_unnormalised_squared_distance():
    x, v, noise = latents()
    result = step("cps", x, v, 0.8, 0.6, noise=noise)
    expected = -((result.std * noise) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(log_prob("cps", x, result.x_next, v, 0.8, 0.6), expected)


@pytest.mark.parametrize("rule", SDE)
def test_log_prob_gradient_equals_finite_differences(rule):
    x, v, noise = latents(shape=(2, 3))
    x_next = step(rule, x, v, 0.8, 0.6, noise=noise).x_next
    assert torch.autograd.gradcheck(
        lambda v: log_prob(rule, x, x_next, v, 0.8, 0.6), v.clone().requires_grad_()
    )


@pytest.mark.parametrize("rule", SDE)
def test_a_sampled_step_is_a_constant_for_its_own_log_prob(rule):
    x, v, noise = latents(shape=(2, 3))
    v.requires_grad_()
    result = step(rule, x, v, 0.8, 0.6, noise=noise)
    replayed = log_prob(rule, x, result.x_next.detach(), v, 0.8, 0.6)
    gradients = [torch.autograd.grad(value.sum(), v)[0] for value in (result.log_prob, replayed)]
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize("rule", RULES)
def test_each_sample_may_have_its_own_sigmas(rule):
    x, v, noise = latents()
    now, later = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.9, 0.5, 0.0])
    together = step(rule, x, v, now, later, noise=noise)
    for i in range(3):
        one = slice(i, i + 1)
        alone = step(rule, x[one], v[one], now[i], later[i], noise=noise[one])
        torch.testing.assert_close(together.x_next[one], alone.x_next)
        torch.testing.assert_close(together.log_prob[one], alone.log_prob)
        torch.testing.assert_close((together.std * torch.ones(3, 1, 1, 1))[i].item(), alone.std.item())


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_input_is_computed_in_float32(rule):
    x, v, noise = (t.bfloat16() for t in latents())
    result = step(rule, x, v, 0.8, 0.6, noise=noise)
    exact = step(rule, x.float(), v.float(), 0.8, 0.6, noise=noise.float())
    assert result.x_next.dtype == torch.bfloat16
    assert torch.equal(result.x_next, exact.x_next.bfloat16())
    assert result.mean.dtype == torch.float32 and torch.equal(result.mean, exact.mean)
    rounded = log_prob(rule, x, result.x_next, v, 0.8, 0.6)
    assert torch.equal(result.log_prob, rounded)


@pytest.mark.parametrize("rule", NORMALIZED)
def test_kl_equals_the_closed_form(rule):
    x, v, other = latents()
    ours, reference = (step(rule, x, w, 0.8, 0.6, noise=other) for w in (v, v + 0.1 * other))
    expected = kl_divergence(Normal(ours.mean, ours.std), Normal(reference.mean, reference.std))
    torch.testing.assert_close(kl(ours.mean, reference.mean, ours.std), expected.flatten(1).mean(1))
    deterministic = kl(ours.mean, reference.mean, torch.zeros(()))
    assert torch.equal(deterministic, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("rule", SDE)
def test_log_ratio_is_the_difference_of_log_probs(rule):
    x, v, noise = latents()
    old = step(rule, x, v, 0.8, 0.6, noise=noise)
    w = v + 1e-3 * noise.flip(0)
    new = step(rule, x, w, 0.8, 0.6, noise=noise)
    difference = log_prob(rule, x, old.x_next, w, 0.8, 0.6) - old.log_prob
    ratio = log_ratio(new.mean, old.mean, old.x_next, old.std, normalized=rule != "cps")
    torch.testing.assert_close(ratio, difference, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("rule", "arguments", "words"),
    [
        ("euler", {}, "rule is 'euler'"),
        ("cps", {"eta": 1.2}, "eta is 1.2"),
        ("flow", {"eta": -1.0}, "eta is -1"),
        ("flow", {"v": torch.zeros(3, 2)}, "v has shape"),
        ("flow", {"sigma": torch.full((2,), 0.5)}, r"sigma has shape \(2,\)"),
        ("flow", {"generator": [torch.Generator()]}, "list of 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(rule, arguments, words):
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=words):
        step(rule, **{"x": x, "v": x, "sigma": 0.8, "sigma_next": 0.6, **arguments})


def test_default_noise_levels_are_the_published_ones():
    assert dict(DEFAULT_ETA) == {"ode": 0.0, "flow": 0.7, "dance": 0.3, "cps": 0.8, "rf_ancestral": 0.7}
