"""Sample pictures during training: one row per sample, given | made | wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .losses import row_noise


@torch.no_grad()
def contact_sheet(task: Any, batches: Any, seed: int, to_device: Callable) -> Tensor:
    """[H,W,3] float32 in 0..1 on the CPU; the same noise at every call. Samples are made one by one."""
    rows = []
    for position in range(len(batches.entries)):
        batch = to_device(batches([position], [False]))
        if task.name == "sd_inpaint":
            batch["empty_tokens"] = task.empty_tokens(batches)
        shape = tuple(batch["latents"].shape[1:])
        noise = row_noise(seed, [position], shape).to(batch["latents"].device)
        given = batch.get("masked_latents", batch.get("references"))
        pictures = [task.host.decode(given)] if given is not None else []
        pictures += [task.sample(batch, noise), task.host.decode(batch["latents"])]
        rows.append(torch.cat([p.float().cpu() for p in pictures], dim=2)[0])
    width = max(row.shape[1] for row in rows)
    rows = [torch.nn.functional.pad(row, (0, 0, 0, width - row.shape[1])) for row in rows]
    return torch.cat(rows, dim=0)


def write(picture: Tensor, path: Path) -> None:
    """Save an IMAGE [H,W,3] as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture.clamp(0, 1).numpy() * 255).round().astype(np.uint8)).save(path)
