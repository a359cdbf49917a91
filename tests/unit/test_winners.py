"""Which try of a group the others are aimed at, how hard, and what that costs, worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_diptych.training.notation import Counted
from comfyui_diptych.training.reinforce import contrastive
from comfyui_diptych.training.reinforce import supervised as states
from comfyui_diptych.training.reinforce.rollout import Rollout, Visited, kept_only
from comfyui_diptych.training.tasks.flux import FluxTask

# Two groups of three tries, in micro-batches of two. Try n's latents are full of n.
ADVANTAGE = torch.tensor([-0.5, 1.2, 0.4, 0.0, 2.0, -1.0])
KEEP = torch.tensor([True, True, True, True, False, True])  # try 4 could not be judged


def pieces(parts=((0, 1), (2, 3), (4, 5))):
    rollouts, worth = [], []
    for members in parts:
        latents = torch.stack([torch.full((1, 2, 2), float(m)) for m in members])
        visited = (latents[:, None].repeat(1, 2, 1, 1, 1) + 0.5, torch.full((len(members), 2), 0.5))
        rollouts.append(Rollout(list(members), {"latents": latents}, latents, visited=visited))
        worth.append((ADVANTAGE[list(members)], KEEP[list(members)]))
    return rollouts, worth


@pytest.mark.parametrize("parts", [((0, 1), (2, 3), (4, 5)), (range(6),), ((0, 1, 2), (3, 4, 5))])
def test_the_best_judged_try_of_a_group_is_the_aim_of_the_others(parts):
    made = contrastive.aimed(*pieces(parts), group_size=3)
    aims = torch.cat([r.aim for r in made])[:, 0, 0, 0]
    pulls = torch.cat([r.pull for r in made])
    assert aims.tolist() == [1, 1, 1, 3, 3, 3]
    # 1.2 - (-.5) is more than 1; the best and the unjudged are not pulled
    torch.testing.assert_close(pulls, torch.tensor([1.0, 0.0, 0.8, 0.0, 0.0, 1.0]))
    assert [r.members for r in made] == [list(part) for part in parts]


def test_a_group_that_nobody_could_judge_pulls_nowhere():
    rollouts, worth = pieces(((0, 1, 2),))
    worth = [(worth[0][0], torch.zeros(3, dtype=torch.bool))]
    (made,) = contrastive.aimed(rollouts, worth, 3)
    assert made.pull.tolist() == [0, 0, 0] and made.aim.isfinite().all()


def test_compacting_keeps_states_aims_and_pulls_together():
    made = contrastive.aimed(*pieces(), group_size=3)
    ((some, places),) = kept_only(made, [torch.tensor([0, 3, 5])])
    assert places.tolist() == [0, 3, 5] and some.members == [0, 3, 5]
    assert some.aim[:, 0, 0, 0].tolist() == [1, 3, 3] and some.pull.tolist() == [1, 0, 1]
    assert some.visited[0][:, :, 0, 0, 0].tolist() == [[0.5, 0.5], [3.5, 3.5], [5.5, 5.5]]
    assert some.visited[1].shape == (3, 2)


def trainer_of(predict, weight=1.0, micro_batch=8, nft_times=0):
    """As much of a trainer as the objective needs; its gradient is the mean over the terms of a rollout."""
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
    return SimpleNamespace(
        task=task,
        config=config,
        terms=lambda rollout: nft_times + contrastive.passes(config, len(rollout.members)),
    )


@pytest.mark.parametrize(("micro_batch", "passes"), [(4, 1), (2, 2)])
@pytest.mark.parametrize("nft_times", [0, 2])
def test_loss_is_how_much_nearer_the_own_end_is_than_the_winners_times_the_pull(
    micro_batch, passes, nft_times
):
    """With velocity 0 the clean latents are x: errors are (x - end)^2, over sigma^2 + the floor."""
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0]])[:, :, None, None, None]
    sigma = torch.tensor([[0.8, 0.2], [0.5, 0.5]])
    own, aim = torch.tensor([3.0, -1.0])[:, None, None, None], torch.tensor([4.0, 1.0])[:, None, None, None]
    batch, pull = {"latents": torch.zeros(2, 1, 1, 1), "prompts": ["a", "b"]}, torch.tensor([1.0, 0.25])
    rollout = Rollout([0, 1], batch, own, visited=(x, sigma), aim=aim, pull=pull)
    trainer = trainer_of(lambda x, time, batch, guidance: torch.zeros_like(x), 3.0, micro_batch, nft_times)
    assert contrastive.passes(trainer.config, 2) == passes
    made = [contrastive.objective(trainer, rollout, number) for number in range(passes)]
    loss = sum(rows for rows, _ in made) / trainer.terms(rollout)
    logged = sum(measures["winner"] for _, measures in made) / passes
    high, low, middle = (s**2 + states.FLOOR for s in (0.8, 0.2, 0.5))
    first = ((9 - 4) / high + (4 - 1) / low) / 2  # x 1 and 2, aim 4, own end 3
    second = 0.25 * ((1 - 1) / middle + (4 - 0) / middle) / 2  # x 0 and -1, aim 1, own end -1
    torch.testing.assert_close(logged, torch.tensor([first, second]))
    # one term beside those of NFT, however many passes it takes
    torch.testing.assert_close(loss, 3 * logged / (nft_times + 1))


def test_what_winner_and_try_have_in_common_has_no_gradient():
    """Both blurred alike: only what sets them apart pulls, from the try's end towards the winner."""
    velocity = torch.zeros(1, 2, 1, 1, 1, requires_grad=True)
    x, sigma = torch.randn(1, 2, 1, 1, 1), torch.tensor([[0.5, 0.9]])

    def gradient(own, aim):
        trainer = trainer_of(lambda x, time, batch, guidance: velocity.flatten(0, 1))
        ends = [torch.full((1, 1, 1, 1), value) for value in (own, aim)]
        rollout = Rollout([0], {}, ends[0], visited=(x, sigma), aim=ends[1], pull=torch.ones(1))
        (found,) = torch.autograd.grad(contrastive.objective(trainer, rollout, 0)[0].sum(), velocity)
        return found.flatten()

    assert gradient(0.7, 0.7).abs().max() == 0
    torch.testing.assert_close(gradient(1.0, 2.0), gradient(5.0, 6.0))
    # a step down the loss moves x0 = x - sigma v towards the winner, here up: v falls
    assert (gradient(1.0, 2.0) > 0).all() and (gradient(2.0, 1.0) < 0).all()


def test_states_are_drawn_from_every_step_but_the_first_and_belong_to_the_try():
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
