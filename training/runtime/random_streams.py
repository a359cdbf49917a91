"""Stateless randomness: what a training row sees depends on the seed and its place in the run alone.

So a resumed run, more processes and gradient accumulation give the same numbers. All are drawn on the CPU,
so that they are the same on every device.
"""

from __future__ import annotations

import hashlib

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
