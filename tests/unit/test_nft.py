"""DiffusionNFT's loss, preference and old policy against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.training.reinforce import objectives
from comfyui_diptych.training.reinforce.objectives import preference
from comfyui_diptych.training.reinforce.weights import OldPolicy
from comfyui_diptych.training.tasks.flux import FluxTask

# One sample of two elements: data (1, 0), noise (0, 2), half way between them.
X0, X, SIGMA = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 1.0]]), torch.tensor([0.5])
V, V_OLD = torch.tensor([[-2.0, 2.0]]), torch.tensor([[0.0, 1.0]])


def nft_loss(x, sigma, x0, v, v_old, wanted, beta):
    """The loss of velocities, as the paper writes it."""
    data, data_old = (FluxTask.data_prediction(x, sigma, velocity) for velocity in (v, v_old))
    return objectives.nft_loss(data, data_old, x0, wanted, beta)


@pytest.mark.parametrize(
    "beta, positive, negative",
    [
        # v+ = (-2, 2): data (1.5, 0), squared error .125, mean |error| .25;
        # v- = (2, 0): data (-.5, 1), 1.625 and 1.25
        (1.0, 0.125 / 0.25, 1.625 / 1.25),
        # v+ = (-1, 1.5): data (1, .25), .03125 and .125; v- = (1, .5): data (0, .75), .78125 and .875
        (0.5, 0.03125 / 0.125, 0.78125 / 0.875),
    ],
)
@pytest.mark.parametrize("wanted", [0.0, 0.75, 1.0])
def test_loss_equals_the_formula(beta, positive, negative, wanted):
    loss = nft_loss(X, SIGMA, X0, V, V_OLD, torch.tensor([wanted]), beta)
    expected = 5 * (wanted * positive / beta + (1 - wanted) * negative / beta)
    assert loss.tolist() == pytest.approx([expected], rel=1e-6)


def test_rows_do_not_see_each_other():
    rows = [(X, X0, V, V_OLD), (2 * X, -X0, V_OLD, V)]
    sigma, wanted = torch.tensor([0.5, 0.3]), torch.tensor([0.2, 0.9])
    x, x0, v, v_old = (torch.cat(parts) for parts in zip(*rows, strict=True))
    together = nft_loss(x, sigma, x0, v, v_old, wanted, 1.0)
    alone = [
        nft_loss(row[0], sigma[i : i + 1], *row[1:], wanted[i : i + 1], 1.0) for i, row in enumerate(rows)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


def test_where_the_policies_agree_the_pull_is_proportional_to_how_much_better_than_even_a_sample_is():
    def pull(wanted):
        v = V_OLD.clone().requires_grad_()
        nft_loss(X, SIGMA, X0, v, V_OLD, torch.tensor([wanted]), 1.0).sum().backward()
        return v.grad

    assert pull(0.5).abs().max() == 0
    torch.testing.assert_close(pull(0.0), -pull(1.0))
    torch.testing.assert_close(pull(0.75), 0.5 * pull(1.0))
    closer = V_OLD - 0.01 * pull(1.0)
    error = [((X - 0.5 * v - X0) ** 2).sum() for v in (closer, V_OLD)]
    assert error[0] < error[1]


def test_a_perfect_prediction_has_no_division_by_zero():
    exact = (X - X0) / SIGMA
    assert nft_loss(X, SIGMA, X0, exact, exact, torch.tensor([1.0]), 1.0).item() == 0


def test_preference_maps_clamped_advantages_to_probabilities():
    got = preference(torch.tensor([-7.0, -5.0, 0.0, 2.5, 5.0, 9.0]))
    assert got.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]


def test_the_old_policy_follows_more_slowly_from_update_to_update():
    parameters = {"w": torch.zeros(1)}
    old = OldPolicy(parameters, 0.5, ramp=0.1)
    seen = []
    for update, value in ((1, 1.0), (2, 2.0), (100, 0.0)):
        parameters["w"].fill_(value)
        old.follow(update)
        seen.append(old.values["w"].item())
    # decay .1, .2 and then the largest, .5
    assert seen == pytest.approx([0.9, 0.2 * 0.9 + 0.8 * 2.0, 0.5 * 1.78])


def test_the_old_policy_is_in_the_model_only_inside_the_block():
    parameters = {"w": torch.zeros(1)}
    old = OldPolicy(parameters, 0.5, ramp=0.1)
    parameters["w"].fill_(3.0)
    with old.active():
        assert parameters["w"].item() == 0
    assert parameters["w"].item() == 3 and old.values["w"].item() == 0
