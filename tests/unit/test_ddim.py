"""DDIM steps against the DDPM posterior and torch's Normal; the loop's records replay exactly."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.samplers import ddim
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal


def latents(shape=(3, 4, 2, 2)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 0.98), st.floats(0.01, 0.99))
def test_eta_one_is_the_ddpm_posterior(alpha, fraction):
    alpha_next = alpha + (1 - alpha) * fraction
    x, data, noise = latents()
    epsilon = (x - alpha**0.5 * data) / (1 - alpha) ** 0.5
    keep = alpha / alpha_next  # x = sqrt(keep) x_next + sqrt(1 - keep) fresh noise
    precision = 1 / (1 - alpha_next) + keep / (1 - keep)
    mean = (alpha_next**0.5 * data / (1 - alpha_next) + keep**0.5 * x / (1 - keep)) / precision

    result = ddim.step(x, epsilon, alpha, alpha_next, eta=1.0, noise=noise)

    torch.testing.assert_close(result.mean, mean)
    torch.testing.assert_close(result.x_next, mean + precision**-0.5 * noise)
    torch.testing.assert_close(result.x0, data)


def test_eta_zero_moves_data_and_noise_to_the_next_level():
    _, data, epsilon = latents()
    x = 0.4**0.5 * data + 0.6**0.5 * epsilon
    result = ddim.step(x, epsilon, 0.4, 0.7)
    torch.testing.assert_close(result.x_next, 0.7**0.5 * data + 0.3**0.5 * epsilon)
    assert torch.equal(result.log_prob, torch.zeros(3, dtype=torch.float64))


def test_the_three_prediction_types_agree():
    x, data, noise = latents()
    a, b = 0.4**0.5, 0.6**0.5
    epsilon = (x - a * data) / b
    predictions = {"epsilon": epsilon, "sample": data, "v_prediction": a * epsilon - b * data}
    ends = [
        ddim.step(x, prediction, 0.4, 0.7, eta=1.0, noise=noise, prediction_type=kind).x_next
        for kind, prediction in predictions.items()
    ]
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


def test_log_prob_is_the_mean_of_the_normal_density():
    x, epsilon, noise = latents()
    result = ddim.step(x, epsilon, 0.4, 0.7, eta=0.8, noise=noise)
    expected = Normal(result.mean, result.std).log_prob(result.x_next).flatten(1).mean(1)
    torch.testing.assert_close(result.log_prob, expected)
    torch.testing.assert_close(ddim.log_prob(x, result.x_next, epsilon, 0.4, 0.7, eta=0.8), expected)
    assert torch.autograd.gradcheck(
        lambda e: ddim.log_prob(x, result.x_next, e, 0.4, 0.7, eta=0.8), epsilon.clone().requires_grad_()
    )


def test_half_precision_input_is_computed_in_float32():
    x, epsilon, noise = (t.bfloat16() for t in latents())
    result = ddim.step(x, epsilon, 0.4, 0.7, eta=1.0, noise=noise)
    exact = ddim.step(x.float(), epsilon.float(), 0.4, 0.7, eta=1.0, noise=noise.float())
    assert torch.equal(result.x_next, exact.x_next.bfloat16())
    assert torch.equal(result.mean, exact.mean)


@pytest.fixture(scope="module")
def predict():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6))
    return lambda x, t: net(x.float() + float(t) / 1000).to(x.dtype)


def start(dtype=torch.float32):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "storage"), [("float32", None), ("float32", "bfloat16"), ("bfloat16", None)]
)
def test_recorded_transitions_replay_to_ratio_one(predict, dtype, storage):
    _, transitions = ddim.sample(
        predict,
        start(getattr(torch, dtype)),
        ddim.schedule(8),
        eta=1.0,
        generator=torch.Generator().manual_seed(7),
        record=True,
        storage_dtype=storage and getattr(torch, storage),
    )
    assert [t.index for t in transitions] == list(range(7))
    for t in transitions:
        assert t.x.dtype == t.x_next.dtype == getattr(torch, storage or dtype)
        replayed = t.replay(predict(t.x.to(getattr(torch, dtype)), t.time))
        assert ((replayed.log_prob - t.log_prob).exp() - 1).abs().max() <= 1e-6
        assert torch.equal(t.log_ratio(replayed.mean), torch.zeros(4))


def test_the_last_step_and_those_outside_the_window_are_deterministic(predict):
    schedule, states = ddim.schedule(6), []
    end, transitions = ddim.sample(
        predict, start(), schedule, eta=1.0, window=(2, 100), record=True, callback=states.append
    )
    assert [t.index for t in transitions] == [2, 3, 4]
    assert [s["i"] for s in states] == list(range(6))
    last = states[-1]
    torch.testing.assert_close(
        end, ddim.step(last["x"], last["prediction"], schedule.alphas[-2], schedule.alphas[-1]).x_next
    )
    ode = []
    ddim.sample(predict, start(), schedule, callback=ode.append)
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(states[:3], ode[:3], strict=True))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: ddim.schedule(0), "steps is 0"),
        (lambda x: ddim.schedule(4, {"beta_schedule": "squaredcos_cap_v2"}), "squaredcos_cap_v2"),
        (lambda x: ddim.schedule(4, {"timestep_spacing": "linspace"}), "linspace"),
        (lambda x: ddim.step(x, x, 0.4, 0.7, eta=2.0), "eta is 2"),
        (lambda x: ddim.step(x, x, 0.4, 0.7, prediction_type="v"), "prediction_type is 'v'"),
        (lambda x: ddim.step(x, x[:1], 0.4, 0.7), "prediction has shape"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(3, 4))


def test_a_noise_level_is_the_share_of_the_training_timesteps():
    assert [ddim.noise_level(t) for t in (0, 501, 999)] == [0.0, 0.501, 0.999]
    assert ddim.noise_level(5, {"num_train_timesteps": 10}) == 0.5


def test_the_weight_of_the_noise_leads_back_to_its_timestep():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # SD 1.5's
    alphas = (1 - betas).cumprod(0)
    for timestep in (1, 301, 501, 701, 999):
        assert ddim.level_of_noise(float((1 - alphas[timestep]).sqrt())) == timestep / 1000
