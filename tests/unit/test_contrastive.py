"""Which sample of a group the others are led to, how far, and what that costs, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfyui_diptych.training.notation import Counted
from comfyui_diptych.training.reinforce import contrastive
from comfyui_diptych.training.reinforce.rollout import Rollout, Visited, kept_only, with_advantages
from comfyui_diptych.training.tasks.flux import FluxTask

# Two groups of three samples, in micro-batches of two. Sample n's latents are full of n.
ADVANTAGE = torch.tensor([-0.5, 1.2, 0.4, 0.0, 2.0, -1.0])
KEEP = torch.tensor([True, True, True, True, False, True])  # sample 4 could not be judged


def pieces(parts=((0, 1), (2, 3), (4, 5)), keep=KEEP):
    rollouts = []
    for members in parts:
        latents = torch.stack([torch.full((1, 2, 2), float(m)) for m in members])
        visited = (latents[:, None].repeat(1, 2, 1, 1, 1) + 0.5, torch.full((len(members), 2), 0.5))
        rollouts.append(Rollout(list(members), {"latents": latents}, latents, visited=visited))
    count = sum(map(len, parts))
    return with_advantages(rollouts, ADVANTAGE[:count], keep[:count])


@pytest.mark.parametrize("parts", [((0, 1), (2, 3), (4, 5)), (range(6),), ((0, 1, 2), (3, 4, 5))])
def test_the_best_judged_sample_of_a_group_leads_the_others(parts):
    made = contrastive.with_best(pieces(parts), group_size=3)
    best = torch.cat([r.best for r in made])[:, 0, 0, 0]
    gaps = torch.cat([r.gap for r in made])
    assert best.tolist() == [1, 1, 1, 3, 3, 3]
    # 1.2 - (-.5) is more than 1; the best and the unjudged have none
    torch.testing.assert_close(gaps, torch.tensor([1.0, 0.0, 0.8, 0.0, 0.0, 1.0]))
    assert [r.members for r in made] == [list(part) for part in parts]


def test_a_group_that_nobody_could_judge_leads_nowhere():
    (made,) = contrastive.with_best(pieces(((0, 1, 2),), torch.zeros(3, dtype=torch.bool)), 3)
    assert made.gap.tolist() == [0, 0, 0] and made.best.isfinite().all()


def test_compacting_keeps_states_best_latents_and_gaps_together():
    made = contrastive.with_best(pieces(), group_size=3)
    chosen = [0, 3, 5]
    made = [replace(r, keep=torch.tensor([m in chosen for m in r.members])) for r in made]
    (some,) = kept_only(made, micro_batch=6)
    assert some.members == chosen and some.advantage.tolist() == ADVANTAGE[chosen].tolist()
    assert some.best[:, 0, 0, 0].tolist() == [1, 3, 3] and some.gap.tolist() == [1, 0, 1]
    assert some.visited[0][:, :, 0, 0, 0].tolist() == [[0.5, 0.5], [3.5, 3.5], [5.5, 5.5]]
    assert some.visited[1].shape == (3, 2)
    first, second = kept_only(made, micro_batch=6, group_size=3)
    assert (first.members, second.members) == ([0], [3, 5])


def loss_of(predict, weight=1.0, micro_batch=8, nft_times=0):
    """The contrastive loss of a model that predicts so."""
    task = SimpleNamespace(
        predict=predict,
        data_prediction=FluxTask.data_prediction,
        noise_share=FluxTask.noise_share,
        cells=lambda batch, x: None,
    )
    config = SimpleNamespace(
        rollout_guidance=1.0,
        contrastive=Counted(2, weight),
        micro_batch=micro_batch,
        nft_times=nft_times,
    )
    return contrastive.Contrastive(task, config)


@pytest.mark.parametrize(("micro_batch", "passes"), [(4, 1), (2, 2)])
@pytest.mark.parametrize("nft_times", [0, 2])
def test_loss_is_how_much_nearer_the_own_end_is_than_the_bests_times_the_gap(micro_batch, passes, nft_times):
    """With velocity 0 the clean latents are x: errors are (x - end)^2, over sigma^2 + the floor."""
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0]])[:, :, None, None, None]
    sigma = torch.tensor([[0.8, 0.2], [0.5, 0.5]])
    own, best = torch.tensor([3.0, -1.0])[:, None, None, None], torch.tensor([4.0, 1.0])[:, None, None, None]
    batch, gap = {"latents": torch.zeros(2, 1, 1, 1), "prompts": ["a", "b"]}, torch.tensor([1.0, 0.25])
    rollout = Rollout([0, 1], batch, own, visited=(x, sigma), best=best, gap=gap)
    found = loss_of(lambda x, time, batch, guidance: torch.zeros_like(x), 3.0, micro_batch, nft_times)
    assert found.passes(2) == passes
    terms = nft_times + passes  # of whose losses the gradient takes the mean
    made = [found.loss(rollout, number, terms) for number in range(passes)]
    loss = sum(rows for rows, _ in made) / terms
    logged = sum(measures["winner"] for _, measures in made) / passes
    high, low, middle = (s**2 + contrastive.FLOOR for s in (0.8, 0.2, 0.5))
    first = ((9 - 4) / high + (4 - 1) / low) / 2  # x 1 and 2, best 4, own end 3
    second = 0.25 * ((1 - 1) / middle + (4 - 0) / middle) / 2  # x 0 and -1, best 1, own end -1
    torch.testing.assert_close(logged, torch.tensor([first, second]))
    # one term beside those of NFT, however many passes it takes
    torch.testing.assert_close(loss, 3 * logged / (nft_times + 1))


def test_what_the_best_and_a_sample_have_in_common_has_no_gradient():
    """Both blurred alike: only what sets them apart pulls, from the sample's end towards the best one's."""
    velocity = torch.zeros(1, 2, 1, 1, 1, requires_grad=True)
    x, sigma = torch.randn(1, 2, 1, 1, 1), torch.tensor([[0.5, 0.9]])

    def gradient(own, best):
        ends = [torch.full((1, 1, 1, 1), value) for value in (own, best)]
        rollout = Rollout([0], {}, ends[0], visited=(x, sigma), best=ends[1], gap=torch.ones(1))
        loss, _ = loss_of(lambda x, time, batch, guidance: velocity.flatten(0, 1)).loss(rollout, 0, 1)
        (found,) = torch.autograd.grad(loss.sum(), velocity)
        return found.flatten()

    assert gradient(0.7, 0.7).abs().max() == 0
    torch.testing.assert_close(gradient(1.0, 2.0), gradient(5.0, 6.0))
    # a step down the loss moves x0 = x - sigma v towards the best, here up: v falls
    assert (gradient(1.0, 2.0) > 0).all() and (gradient(2.0, 1.0) < 0).all()


def test_states_are_drawn_from_every_step_but_the_first_and_belong_to_the_sample():
    def notes(members):
        visited = Visited(3, 5, 7, members)
        for i in range(5):
            x = torch.stack([torch.full((1, 2, 2), m + i / 10) for m in members])
            visited({"i": i, "x": x, "sigma": 1 - i / 5})
        return visited.joined()

    x, sigma = notes(range(200))
    assert x.shape == (200, 3, 1, 2, 2) and sigma.shape == (200, 3)
    steps = ((1 - sigma) * 5).round()
    assert sorted(steps.unique().tolist()) == [1, 2, 3, 4]
    assert min(int((steps == step).sum()) for step in range(1, 5)) > 100  # of 600, each a quarter
    members = torch.arange(200.0)[:, None]
    torch.testing.assert_close(x[:, :, 0, 0, 0], members + steps / 10)
    alone, _ = notes([150, 40])
    torch.testing.assert_close(alone, x[[150, 40]])
