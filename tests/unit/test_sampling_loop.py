"""The flow-match loop: windows, seeds, records and their exact replay."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.samplers.flow_match import RULES, log_prob, sample, velocity_kl, window_steps
from comfyui_diptych.samplers.gaussian import draw_noise, sde_seed
from comfyui_diptych.samplers.schedule import sigmas

SDE = [rule for rule in RULES if rule != "ode"]
SCHEDULE = sigmas(8, shift=3.0)


@pytest.fixture(scope="module")
def velocity():
    """A small network, so that a replayed velocity depends on every bit of its input."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6))

    def call(x, sigma):
        return net(x.float() + float(sigma)).to(x.dtype)

    return call


def noise(batch=4, dtype=torch.float32):
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def test_the_ode_is_a_plain_euler_loop(velocity):
    x = noise()
    with torch.no_grad():
        for sigma, sigma_next in zip(SCHEDULE[:-1], SCHEDULE[1:], strict=True):
            x = x + (sigma_next - sigma) * velocity(x, sigma)
    assert torch.equal(sample(velocity, noise(), SCHEDULE), x)


@pytest.mark.parametrize("storage", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", SDE)
def test_recorded_transitions_replay_to_ratio_one(velocity, rule, storage):
    _, transitions = sample(
        velocity, noise(), SCHEDULE, rule=rule, generator=seeded(), record=True, storage_dtype=storage
    )
    assert [t.index for t in transitions] == list(range(7))
    for t in transitions:
        assert t.x.dtype == t.x_next.dtype == (storage or torch.float32)
        v = velocity(t.x.float(), t.time)
        replayed = t.replay(v)
        sigma_next = SCHEDULE[t.index + 1]
        again = log_prob(rule, t.x, t.x_next, v, t.time, sigma_next, sigma_max=SCHEDULE[1])
        for value in (replayed.log_prob, again):
            assert ((value - t.log_prob).exp() - 1).abs().max() <= 1e-6
        assert torch.equal(t.log_ratio(replayed.mean), torch.zeros(4))


@pytest.mark.parametrize("rule", SDE)
def test_a_bfloat16_rollout_replays_to_ratio_one(velocity, rule):
    start = noise(dtype=torch.bfloat16)
    end, transitions = sample(velocity, start, SCHEDULE, rule=rule, generator=seeded(), record=True)
    assert end.dtype == torch.bfloat16
    for t in transitions:
        assert t.x.dtype == torch.bfloat16
        assert ((t.replay(velocity(t.x, t.time)).log_prob - t.log_prob).exp() - 1).abs().max() <= 1e-6


def test_a_replay_carries_gradients_to_the_velocity(velocity):
    _, (t, *_) = sample(velocity, noise(), SCHEDULE, rule="flow", generator=seeded(), record=True)
    v = velocity(t.x, t.time).detach().requires_grad_()
    gradient = torch.autograd.grad(t.replay(v).log_prob.sum(), v)[0]
    std = t.std.item()
    sigma, length = t.time, t.time - SCHEDULE[t.index + 1].item()
    mean_slope = -(1 + std**2 / length * (1 - sigma) / (2 * sigma)) * length
    torch.testing.assert_close(gradient, (t.x_next - t.mean) / std**2 * mean_slope / 6)


@pytest.mark.parametrize("rule", SDE)
def test_outside_the_window_the_steps_are_ode(velocity, rule):
    seen = []
    end, transitions = sample(
        velocity,
        noise(),
        SCHEDULE,
        rule=rule,
        window=(2, 4),
        generator=seeded(),
        record=True,
        callback=lambda state: seen.append(state["x"]),
    )
    ode = []
    sample(velocity, noise(), SCHEDULE, callback=lambda state: ode.append(state["x"]))
    assert [t.index for t in transitions] == [2, 3]
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], ode[:3], strict=True))
    assert not torch.equal(seen[3], ode[3])
    tail = sample(velocity, transitions[-1].x_next, SCHEDULE[4:])
    assert torch.equal(end, tail)


def test_recording_changes_nothing(velocity):
    settings = {"rule": "flow", "window": {1, 3}}
    plain = sample(velocity, noise(), SCHEDULE, generator=seeded(), **settings)
    recorded, _ = sample(velocity, noise(), SCHEDULE, generator=seeded(), record=True, **settings)
    assert torch.equal(plain, recorded)


def test_ode_records_nothing(velocity):
    _, transitions = sample(velocity, noise(), SCHEDULE, record=True)
    assert transitions == []


def test_a_seed_decides_the_path(velocity):
    runs = [sample(velocity, noise(), SCHEDULE, rule="dance", generator=seeded(seed)) for seed in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_generator_per_sample_makes_samples_independent_of_their_batch(velocity):
    together = sample(velocity, noise(), SCHEDULE, rule="cps", generator=[seeded(i) for i in range(4)])
    for i in range(4):
        alone = sample(velocity, noise()[i : i + 1], SCHEDULE, rule="cps", generator=[seeded(i)])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_the_sde_seed_never_draws_the_starting_noise_again():
    start = torch.randn(2, 6, generator=seeded(5))
    again = draw_noise(start, torch.Generator().manual_seed(sde_seed(5)))
    assert not torch.equal(start, again)
    assert sde_seed(5) == sde_seed(5, 0) != sde_seed(5, 1) != sde_seed(6, 1)
    assert 0 <= sde_seed(2**64 - 1, 2**64 - 1) < 2**63


def test_the_callback_sees_each_step(velocity):
    states = []
    sample(velocity, noise(), SCHEDULE, callback=states.append)
    assert [s["i"] for s in states] == list(range(8))
    for s in states:
        assert {"i", "sigma", "sigma_next", "x", "denoised", "v"} <= s.keys()
        torch.testing.assert_close(s["denoised"], s["x"] - s["sigma"] * s["v"])


def test_a_schedule_may_end_above_zero_and_be_taken_up_again(velocity):
    halfway = sample(velocity, noise(), SCHEDULE[:5])
    torch.testing.assert_close(sample(velocity, halfway, SCHEDULE[4:]), sample(velocity, noise(), SCHEDULE))


def test_the_ode_may_run_upwards(velocity):
    up = sample(velocity, noise(), SCHEDULE[1:-1].flip(0))
    assert torch.isfinite(up).all()


def test_windows():
    assert window_steps(None, 3) == {0, 1, 2}
    assert window_steps((1, 100), 3) == {1, 2}
    assert window_steps((2, 2), 3) == frozenset()
    assert window_steps({0, 2}, 3) == {0, 2}
    assert window_steps(range(1, 3), 3) == {1, 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"window": [0, 2]}, "tuple"),
        ({"window": (3, 1)}, "0 <= start <= end"),
        ({"window": (8, 10)}, "starts at step 8"),
        ({"window": {9}}, "step 9"),
        ({"sigmas": torch.empty(0)}, "sigmas has 0 values"),
        ({"sigmas": SCHEDULE.flip(0)}, "needs them to fall"),
        ({"sigmas": torch.tensor([0.99, 0.9, 0.5, 0.0])}, "unstable at step 0"),
        ({"rule": "euler"}, "choose one of"),
    ],
)
def test_refused_before_the_first_model_call(arguments, words):
    def never(x, sigma):
        raise AssertionError("the model was called")

    with pytest.raises(ValueError, match=words):
        sample(never, noise(), **{"sigmas": SCHEDULE, "rule": "flow", **arguments})


def test_velocity_kl_is_the_mean_squared_difference():
    v, w = noise(), noise().flip(0)
    torch.testing.assert_close(
        velocity_kl(v, w), torch.stack([((a - b) ** 2).mean() for a, b in zip(v, w, strict=True)])
    )
