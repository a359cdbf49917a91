"""Sample pictures during training: one row per sample, given | made | wanted (if the data has it)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.image_files import to_pil
from ..data.dataset import latents_like
from ..runtime.random_streams import row_noise


@torch.no_grad()
def contact_sheet(task: Any, batches: Any, seed: int, to_device: Callable) -> Tensor:
    """[H,W,3] float32 in 0..1 on the CPU; the same noise at every call. Samples are made one by one."""
    rows = []
    for position in range(min(task.config.sample_count, len(batches.entries))):
        batch = to_device(batches([position], [False]))
        batch = task.guided(batch, batches.text, task.config.sample_guidance)
        like = latents_like(batch)
        noise = row_noise(seed, [position], tuple(like.shape[1:])).to(like.device)
        given = batch.get("masked_latents", batch.get("references"))
        pictures = [task.host.decode(given)] if given is not None else []
        pictures.append(task.sample(batch, noise))
        if batches.targets:
            pictures.append(task.host.decode(batch["latents"]))
        rows.append(torch.cat([p.float().cpu() for p in pictures], dim=2)[0])
    width = max(row.shape[1] for row in rows)
    rows = [torch.nn.functional.pad(row, (0, 0, 0, width - row.shape[1])) for row in rows]
    return torch.cat(rows, dim=0)


@contextmanager
def for_sampling(trainer: Any) -> Iterator[None]:
    """Modules in eval mode and, unless they are sharded, without their distributed wrappers."""
    part = trainer.task.denoiser_part
    modes = {name: module.training for name, module in trainer.model.parts.items()}
    for module in trainer.model.parts.values():
        module.eval()
    if not trainer.processes.sharded:
        trainer.task.make_host(trainer.model.parts[part])
    try:
        yield
    finally:
        trainer.task.make_host(trainer.model.prepared[part])
        for name, module in trainer.model.parts.items():
            module.train(modes[name])


def track(accelerator: Any, picture: Tensor, step: int) -> None:
    """Show an IMAGE [H,W,3] in the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": picture[None].numpy()}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"samples": [picture.numpy()]}, step=step)


def write(picture: Tensor, path: Path) -> None:
    """Save an IMAGE [H,W,3] as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(picture).save(path)
