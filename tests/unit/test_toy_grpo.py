"""GRPO on a world small enough to see through: a 2-D mixture of Gaussians whose velocity is known exactly.

The policy is the exact velocity plus a small network that starts at zero, as a LoRA does. Rollouts, replay,
advantages and loss are the product's own; only the loop is written here.
"""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.samplers import flow_match, schedule
from comfyui_diptych.training.reinforce.advantage import advantages
from comfyui_diptych.training.reinforce.objectives import clipped_loss
from comfyui_diptych.training.reinforce.windows import Window
from torch import nn

MODES = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
SPREAD = 0.2
STEPS, GROUPS, SIZE = 8, 8, 16
OPTIMUM = 1.0  # of the reward: the sample lies on the chosen mode


def mixture_velocity(x, sigma):
    """E[noise - data | x] of the mixture, at x = (1 - sigma) data + sigma noise."""
    keep = 1 - sigma
    variance = keep**2 * SPREAD**2 + sigma**2
    offset = x[:, None] - keep * MODES
    weight = (-(offset**2).sum(-1) / (2 * variance)).softmax(-1)[..., None]
    data = MODES + keep * SPREAD**2 / variance * offset
    noise = sigma / variance * offset
    return (weight * (noise - data)).sum(1)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, sigma):
        when = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x), 1)
        return mixture_velocity(x, sigma) + self.net(torch.cat([x, when], dim=1))


def reward(x):
    """Closeness to the first mode, 0..1."""
    return (-((x - MODES[0]) ** 2).sum(-1) / 8).exp()


def held_out(policy):
    noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(99))
    return reward(flow_match.sample(policy, noise, schedule.sigmas(STEPS, shift=1.0))).mean().item()


def reinforce(rule, updates):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    policy, sigmas = Policy(), schedule.sigmas(STEPS, shift=1.0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    groups = torch.arange(GROUPS).repeat_interleave(SIZE)
    for update in range(updates):
        window = Window("random", 3, STEPS, last=5).at(update)
        noise = torch.randn(GROUPS, 2, generator=generator).repeat_interleave(SIZE, dim=0)
        x0, steps = flow_match.sample(
            policy, noise, sigmas, rule=rule, window=window, generator=generator, record=True
        )
        found = advantages({"near": reward(x0)}, groups, {"near": 1.0})
        for step in steps:
            replayed = step.replay(policy(step.x, step.time))
            loss = (clipped_loss(step.log_ratio(replayed.mean), found.values, 0.2).loss * found.keep).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return policy


def test_the_toy_velocity_reaches_all_modes_alike():
    assert held_out(Policy()) == pytest.approx(0.25 * (1 + 2 * 0.135 + 0.018), abs=0.05)


@pytest.mark.parametrize("rule", ["flow", "rf_ancestral"])
def test_reward_training_finds_nearly_the_optimum(rule):
    assert held_out(reinforce(rule, 80)) >= 0.9 * OPTIMUM
