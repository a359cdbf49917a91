"""Stateless randomness: what a training row sees depends on the seed and its place in the run alone.

So a resumed run, more processes and gradient accumulation give the same numbers. All are drawn on the CPU,
so that they are the same on every device. The global generators, whose state a checkpoint keeps, serve only
dropout and new weights.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def row_generator(seed: int, position: int, stream: str = "") -> torch.Generator:
    """CPU generator of row `position` (global count of rows since step 0) for the use named `stream`."""
    digest = hashlib.blake2b(f"{seed}/{position}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def row_noise(seed: int, positions: list[int], shape: tuple[int, ...], offset: float = 0.0) -> Tensor:
    """Standard normal noise [B, *shape] float32; `offset` adds that strength times one normal per channel."""
    rows = []
    for position in positions:
        generator = row_generator(seed, position, "noise")
        noise = torch.randn(shape, generator=generator)
        if offset:
            per_channel = (shape[0],) + (1,) * (len(shape) - 1)
            noise = noise + offset * torch.randn(per_channel, generator=generator)
        rows.append(noise)
    return torch.stack(rows)


def row_uniform(seed: int, positions: list[int], stream: str) -> Tensor:
    """One uniform number in [0, 1) per row, float64 [B]."""
    rows = [
        torch.rand((), generator=row_generator(seed, position, stream), dtype=torch.float64)
        for position in positions
    ]
    return torch.stack(rows)


def rng_state() -> dict[str, Any]:
    """State of the global generators of torch, numpy and Python, as tensors and numbers only."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Go on from what `rng_state` gave."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
