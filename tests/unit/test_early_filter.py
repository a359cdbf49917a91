"""Best of N while sampling: the best is the plain sampler's own image, and nothing is computed twice."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.samplers import early_filter, flow_match, schedule
from comfyui_diptych.samplers.early_filter import best_of, candidate_seed, choose, sde_generators

STEPS, JUDGED = 8, 3
SIGMAS = schedule.sigmas(STEPS, seq_len=64)


def velocity(x, sigma):
    return torch.sin(2 * x + sigma)


def noises(count, seed=5):
    return torch.cat(
        [
            torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(candidate_seed(seed, i)))
            for i in range(count)
        ]
    )


def brightness(x0):
    return x0.flatten(1).mean(1)


class Counted:
    """The velocity, counting samples and calls."""

    def __init__(self):
        self.samples = self.calls = 0

    def __call__(self, x, sigma):
        self.samples, self.calls = self.samples + len(x), self.calls + 1
        return velocity(x, sigma)


@pytest.mark.parametrize("rule", flow_match.RULES)
@pytest.mark.parametrize("judged", [1, JUDGED, STEPS])
def test_one_candidate_is_the_plain_sampler_to_the_last_bit(rule, judged):
    plain = flow_match.sample(
        velocity, noises(1), SIGMAS, rule=rule, window=(1, 6), generator=sde_generators(5, 1)
    )
    ours = best_of(
        velocity, noises(1), SIGMAS, brightness, judge_steps=judged, rule=rule, window=(1, 6),
        generators=sde_generators(5, 1),
    )  # fmt: skip
    assert torch.equal(ours.latents, plain)
    assert ours.cost.evaluations == STEPS


@pytest.mark.parametrize("rule", flow_match.RULES)
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_the_best_is_the_image_of_its_own_seed(rule, batch):
    made = best_of(
        velocity, noises(6), SIGMAS, brightness, judge_steps=JUDGED, rule=rule, batch=batch,
        generators=sde_generators(5, 6),
    )  # fmt: skip
    best = candidate_seed(5, int(made.chosen[0]))
    alone = flow_match.sample(velocity, noises(1, best), SIGMAS, rule=rule,
                              generator=sde_generators(best, 1))  # fmt: skip
    torch.testing.assert_close(made.latents, alone, rtol=0, atol=1e-6)


def test_the_judge_sees_where_each_candidate_is_heading():
    seen = []

    def judge(x0):
        seen.append(x0)
        return brightness(x0)

    best_of(velocity, noises(3), SIGMAS, judge, judge_steps=JUDGED)
    x = flow_match.sample(velocity, noises(3), SIGMAS[:JUDGED])
    expected = x - SIGMAS[JUDGED - 1] * velocity(x, SIGMAS[JUDGED - 1])
    torch.testing.assert_close(seen[0], expected)
    assert len(seen) == 1


@pytest.mark.parametrize("count, judged, keep", [(6, 3, 1), (6, 3, 2), (4, 8, 1), (1, 1, 1)])
def test_the_cost_is_what_was_spent(count, judged, keep):
    model = Counted()
    made = best_of(model, noises(count), SIGMAS, brightness, judge_steps=judged, keep=keep)
    assert model.samples == made.cost.evaluations == count * judged + keep * (STEPS - judged)
    assert model.calls == STEPS
    assert made.cost.plain == STEPS and made.cost.exhaustive == count * STEPS
    assert str(model.samples) in str(made.cost)


def test_the_best_are_kept_in_order_and_failures_come_last():
    made = best_of(
        velocity, noises(4), SIGMAS, lambda x0: torch.tensor([0.1, float("nan"), 0.9, 0.4]),
        judge_steps=JUDGED, keep=4,
    )  # fmt: skip
    assert made.chosen.tolist() == [2, 3, 0, 1]
    everyone = flow_match.sample(velocity, noises(4), SIGMAS)
    torch.testing.assert_close(made.latents, everyone[made.chosen])
    assert choose(torch.full((3,), torch.nan)).tolist() == [0]
    assert choose(torch.tensor([1.0, 2.0, 2.0])).tolist() == [1]
    assert choose(torch.tensor([[1.0, 5.0], [2.0, 4.0]])).tolist() == [[1, 0]]


def test_the_best_of_many_is_better_on_average():
    gain = []
    for seed in range(20):
        one, six = (
            best_of(
                velocity, noises(count, 100 * seed), SIGMAS, brightness, judge_steps=JUDGED
            ).latents.mean()
            for count in (1, 6)
        )
        gain.append(six - one)
    assert torch.stack(gain).mean() > 0.05


@pytest.mark.parametrize(
    "options, message",
    [
        ({"judge_steps": 0}, "judging after 0 steps does not fit a schedule of 8"),
        ({"judge_steps": 9}, "choose 1 to 8"),
        ({"judge_steps": 3, "keep": 3}, "3 of 2 candidates cannot be kept"),
        ({"judge_steps": 3, "generators": sde_generators(0, 1)}, "1 generators were given for 2"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_before_the_model_is_called(options, message):
    model = Counted()
    with pytest.raises(ValueError, match=message):
        best_of(model, noises(2), SIGMAS, brightness, **options)
    assert model.calls == 0


def test_a_judge_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="one score each"):
        best_of(velocity, noises(2), SIGMAS, lambda x0: torch.zeros(3), judge_steps=1)
    with pytest.raises(ValueError, match="at least one"):
        early_filter.check(0, 1, 1, 4)
