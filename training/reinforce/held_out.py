"""Held-out rows sampled by the plain ODE and judged: the figure by which the best weights are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import latents_like
from ..runtime.random_streams import row_noise
from ..tasks.sampling import RolloutSettings

STRETCH = 1 << 52  # of the random stream; rollouts number their noise from 0


@torch.no_grad()
def try_rows(
    trainer: Any,
    batches: Any,
    numbers: Sequence[int],
    steps: int = 0,
    lora_window: tuple[float, float] | None = None,
) -> dict[str, Tensor]:
    """Raw scores [N] float32 by reward of one ODE picture of each row, from noise that its number fixes.

    In `steps` steps, 0 = as many as a rollout; with the LoRA in `lora_window` only, None = always. Every
    process calls it with rows of its own, maybe none.
    """
    c = trainer.config
    judge = trainer.judge_of(batches)
    settings = RolloutSettings(steps or c.rollout_steps, c.rollout_guidance, lora_window=lora_window)
    parts = [
        places[start : start + c.micro_batch]
        for places in by_size(batches.entries, numbers)
        for start in range(0, len(places), c.micro_batch)
    ]
    # All rewards, whether there are rows or not: every process gathers as many tables.
    out = {reward.name: torch.full((len(numbers),), torch.nan) for reward in trainer.rewards.rewards}
    for places in parts:
        some = [numbers[place] for place in places]
        batch = trainer.rollout_batch(batches, some)
        like = latents_like(batch)
        noise = row_noise(c.seed, [STRETCH + n for n in some], tuple(like.shape[1:])).to(like.device)
        latents, _ = trainer.task.rollout(batch, noise, settings)
        for name, values in judge(trainer.task.host.decode(latents), some).items():
            out[name][places] = values
    return out


def by_size(entries: Any, numbers: Sequence[int]) -> list[list[int]]:
    """Positions in `numbers`, those of rows that may share a batch together."""
    buckets: dict[tuple, list[int]] = {}
    for place, number in enumerate(numbers):
        buckets.setdefault(entries[number].bucket, []).append(place)
    return list(buckets.values())


def gathered(accelerator: Any, scores: Tensor) -> Tensor:
    """The scores [N] of all processes on the CPU, which may have different N: the rest is NaN."""
    padded = accelerator.pad_across_processes(scores.to(accelerator.device), pad_index=float("nan"))
    return accelerator.gather(padded).cpu()
