"""The policy-gradient objective against numpy, finite differences and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfyui_diptych.samplers import flow_match
from comfyui_diptych.training.reinforce.advantage import advantages
from comfyui_diptych.training.reinforce.objectives import clipped_loss
from comfyui_diptych.training.reinforce.windows import Window


def test_advantages_equal_numpy_with_failures_left_out():
    scores = np.array([0.1, 0.4, np.nan, 0.9, 0.2, 0.3, 0.5, 0.8], dtype=np.float32)
    groups = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    got = advantages({"r": torch.from_numpy(scores)}, torch.from_numpy(groups), {"r": 2.0}, scale="global")
    spread = np.nanstd(scores) + 1e-4
    expected = np.zeros(8)
    for group in (0, 1):
        rows = groups == group
        expected[rows] = 2.0 * (scores[rows] - np.nanmean(scores[rows])) / spread
    np.testing.assert_allclose(got.values.numpy(), np.nan_to_num(expected), rtol=1e-4, atol=1e-6)
    assert got.keep.tolist() == [True, True, False, True, True, True, True, True]


def test_one_group_falls_back_to_its_own_std():
    scores = {"r": torch.tensor([1.0, 2.0, 3.0])}
    alone = torch.zeros(3, dtype=torch.long)
    one = advantages(scores, alone, {"r": 1.0}, scale="global")
    torch.testing.assert_close(one.values, advantages(scores, alone, {"r": 1.0}, scale="group").values)


def test_a_group_without_a_best_sample_is_filtered_and_changes_nothing_else():
    groups = torch.tensor([0, 0, 1, 1])
    got = advantages({"r": torch.tensor([0.0, 1.0, 0.5, 0.5])}, groups, {"r": 1.0}, scale="group")
    alone = advantages({"r": torch.tensor([0.0, 1.0])}, groups[:2], {"r": 1.0}, scale="group")
    assert got.keep.tolist() == [True, True, False, False]
    torch.testing.assert_close(got.values[:2], alone.values)


def test_advantages_are_clamped():
    scores = torch.zeros(100)
    scores[0] = 1.0
    got = advantages({"r": scores}, torch.zeros(100, dtype=torch.long), {"r": 1.0})
    assert got.values.max() == 5.0


@pytest.mark.parametrize("scale", ["global", "group"])
@pytest.mark.parametrize("size", [2, 6, 12, 24])
def test_equal_raw_scores_teach_nothing_whatever_their_mean_is_rounded_to(scale, size):
    generator = torch.Generator().manual_seed(size)
    for _ in range(50):
        equal = torch.full((size,), float(torch.rand((), generator=generator)))
        scores = torch.cat([equal, torch.rand(size, generator=generator)])
        scores[1] = torch.nan  # a failure does not tell them apart either
        groups = torch.tensor([0] * size + [1] * size)
        got = advantages({"r": scores}, groups, {"r": 1.0}, scale=scale)
        assert not got.keep[:size].any() and got.keep[size:].all()
        assert (got.values[:size] == 0).all() and (got.values[size:] != 0).any()


def test_a_group_that_one_of_two_rewards_tells_apart_is_kept():
    scores = {"same": torch.full((4,), 0.7), "other": torch.tensor([0.1, 0.2, 0.3, 0.3])}
    got = advantages(scores, torch.zeros(4, dtype=torch.long), {"same": 1.0, "other": 1e-3})
    assert got.keep.all() and got.values[0] < got.values[1] < got.values[2] == got.values[3]


@pytest.mark.parametrize("rule", ["flow", "dance", "cps", "rf_ancestral"])
def test_gradient_of_the_loss_is_minus_advantage_times_gradient_of_log_prob(rule):
    torch.manual_seed(0)
    weight = torch.tensor(0.3, dtype=torch.float64)
    noise = torch.randn(4, 6, dtype=torch.float64)
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0])

    def velocity(w):
        return lambda x, sigma: w * x + 0.1

    _, transitions = flow_match.sample(
        velocity(weight), noise, sigmas, rule=rule, window=(1, 2), record=True,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    transition, advantage = transitions[0], torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)

    def log_prob(w):
        return transition.replay(velocity(w)(transition.x, transition.time)).log_prob

    w = weight.clone().requires_grad_()
    replayed = transition.replay(velocity(w)(transition.x, transition.time))
    ratio = transition.log_ratio(replayed.mean)
    assert ratio.detach().abs().max() < 1e-12
    clipped_loss(ratio, advantage, clip=1e-4).loss.mean().backward()
    h = 1e-5
    slope = (log_prob(weight + h) - log_prob(weight - h)) / (2 * h)
    assert w.grad.item() == pytest.approx((-advantage * slope).mean().item(), rel=1e-5)


def test_clipping_stops_the_gradient_only_in_the_advantage_direction():
    log_ratio = torch.tensor([0.01, 0.01, -0.01, -0.01], requires_grad=True)
    result = clipped_loss(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), clip=1e-3)
    (gradient,) = torch.autograd.grad(result.loss.sum(), log_ratio)
    assert (gradient == 0).tolist() == [True, False, False, True]
    assert result.clipped.all()


def test_windows():
    assert Window("fixed", 2, 10, first=1, last=9).at(7) == (1, 3)
    assert [Window("progressive", 2, 6, last=5, every=2).at(i) for i in (0, 2, 6, 8)] == [
        (0, 2),
        (1, 3),
        (3, 5),
        (0, 2),
    ]
    drawn = {Window("random", 2, 10, last=5, seed=3).at(i) for i in range(64)}
    assert drawn == {(0, 2), (1, 3), (2, 4), (3, 5)}
    assert Window.read("random", 2, 10, 3).at(5) == Window("random", 2, 10, last=5, seed=3).at(5)
    with pytest.raises(ValueError, match="does not fit"):
        Window.read("fixed", 4, 4).check()
