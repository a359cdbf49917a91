"""Sigma schedules of flow matching: which noise levels a sampler visits, from 1 (noise) down to 0 (data).

The grid is the one FLUX pipelines use, `linspace(1, 1/n, n)` followed by a time shift and a final 0. It knows
nothing of models or of ComfyUI; the steps between two sigmas are in `flow_match.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["dynamic_mu", "sigmas", "token_count", "total_steps"]


def token_count(height: int, width: int) -> int:
    """Transformer tokens of latents `height` x `width` (latent units, one token per 2x2).

    Odd sizes count as the model sees them: padded up to the next even row or column.
    """
    return math.ceil(height / 2) * math.ceil(width / 2)


def dynamic_mu(
    seq_len: int,
    *,
    base_len: int = 256,
    max_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """FLUX's resolution-dependent shift `mu`: a line through (256 tokens, 0.5) and (4096 tokens, 1.15).

    `seq_len` counts the tokens of the image that is denoised: a diptych's is that of both panels together,
    references and text do not count. The schedule is shifted by `exp(mu)`. Beyond 4096 tokens the line goes
    on, as in diffusers' `calculate_shift`. Raises ValueError for less than one token.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}: give the number of image tokens, (height/16) * (width/16).")
    slope = (max_shift - base_shift) / (max_len - base_len)
    return base_shift + slope * (seq_len - base_len)


def total_steps(steps: int, denoise: float = 1.0) -> int:
    """Length of the full schedule whose last `steps` steps are run at this `denoise`, as ComfyUI counts.

    Raises ValueError for no step and a denoise outside 0..1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: at least one step is needed.")
    if not 0.0 <= denoise <= 1.0:
        raise ValueError(
            f"denoise is {denoise}: give a value from 0 (keep the image) to 1 (start from noise)."
        )
    return int(steps / denoise) if denoise > 0 else 0


def sigmas(
    steps: int,
    *,
    seq_len: int | None = None,
    shift: float | None = None,
    denoise: float = 1.0,
) -> Tensor:
    """The sigmas of a run: float32 [steps + 1] on the CPU, falling, the last one 0.

    Give `seq_len` (image tokens) for FLUX's dynamic shift, or a fixed `shift`, or neither for the plain grid.
    A shift `s` maps `t` to `s t / (1 + (s - 1) t)`; the dynamic one is `s = exp(dynamic_mu(seq_len))`, so
    core ComfyUI's ModelSamplingFlux value 1.15 is `shift=exp(1.15)`, and DanceGRPO's 3 is `shift=3`.

    `denoise` below 1 works as in ComfyUI: the grid has `int(steps / denoise)` steps and its last `steps` are
    returned, so the number of model calls stays `steps` (diffusers' `strength` makes fewer calls instead).
    `denoise=0` returns an empty tensor: nothing to run.

    Equals `FlowMatchEulerDiscreteScheduler.set_timesteps(sigmas=linspace(1, 1/n, n), mu=...)` of diffusers.
    Raises ValueError for a step count, shift or denoise out of range, or when both shifts are given.
    """
    if seq_len is not None and shift is not None:
        raise ValueError(
            f"seq_len {seq_len} and shift {shift} are both given: keep one, they exclude each other."
        )
    if shift is not None and not shift > 0:
        raise ValueError(f"shift is {shift}: it must be above 0 (1 leaves the schedule unshifted).")
    total = total_steps(steps, denoise)
    if total == 0:
        return torch.empty(0, dtype=torch.float32)
    factor = math.exp(dynamic_mu(seq_len)) if seq_len is not None else (shift or 1.0)
    grid = torch.linspace(1.0, 1.0 / total, total, dtype=torch.float64)
    shifted = factor * grid / (1.0 + (factor - 1.0) * grid)
    return torch.cat([shifted, shifted.new_zeros(1)]).float()[-(steps + 1) :]
