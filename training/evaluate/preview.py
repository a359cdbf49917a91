"""Sample images during training: one row per sample, by default source | sample | target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.image_files import to_pil
from ..data.dataset import Batches
from ..runtime.random_streams import row_noise
from ..tasks.base import Task
from .plots import as_image, contact_sheet


@torch.no_grad()
def sample_sheet(
    task: Task,
    batches: Batches,
    make_batch: Callable[[list[int]], dict[str, Any]],
    *,
    seed: int,
    count: int,
) -> Tensor:
    """Samples of the first `count` rows as an image [H,W,3] in 0..1 on the CPU; the same noise at every call.

    make_batch: row numbers to the tensors that sampling needs. Samples are made one by one, and shown at
    their own size.
    """
    before, _, after = batches.corpus.preprocessor.template.partition("{instruction}")
    rows = []
    for number in range(min(count, len(batches.entries))):
        batch = make_batch([number])
        noise = row_noise(seed, [number], task.noise_shape(batch)).to(task.device)
        shown = task.shown(batch, noise, batches.targets)
        images = {name: image[0].float().cpu() for name, image in shown.items() if image is not None}
        prompt = batches.entries[number].prompt.removeprefix(before).removesuffix(after)
        rows.append((list(images.values()), task.title(batch, prompt)))
    side = max(max(image.shape[:2]) for row, _ in rows for image in row)
    return as_image(contact_sheet(rows, tuple(images), side=side, columns=1))[0]


@contextmanager
def for_sampling(
    task: Task, parts: Mapping[str, nn.Module], prepared: Mapping[str, nn.Module], sharded: bool
) -> Iterator[None]:
    """The trained modules in eval mode and, unless they are sharded, without their distributed wrappers.

    parts, prepared: the modules as they are and as accelerate wraps them, by name.
    """
    part = task.denoiser_part
    modes = {name: module.training for name, module in parts.items()}
    for module in parts.values():
        module.eval()
    if not sharded:
        task.make_host(parts[part])
    try:
        yield
    finally:
        task.make_host(prepared[part])
        for name, module in parts.items():
            module.train(modes[name])


def track(trackers: Sequence[Any], image: Tensor, step: int) -> None:
    """Show an image [H,W,3] in those of accelerate's trackers that take images."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": image[None].numpy()}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"samples": [image.numpy()]}, step=step)


def write(image: Tensor, path: Path) -> None:
    """Save an image [H,W,3] as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(image).save(path)
