"""Prior preservation: the class images that keep a subject from swallowing its class (DreamBooth).

The model itself makes them before it is trained, by inpainting a fully masked image of noise; a folder that
holds enough is left as it is. They join the data as rows marked `prior` (`preprocess.Corpus`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from ..runtime.processes import Processes, Progress
from ..runtime.random_streams import row_generator, row_noise
from .files import class_files
from .preprocess import Preprocessed
from .sample import to_pil


def check(config: Any) -> None:
    """Raises ValueError where prior preservation is asked for but cannot be done."""
    if config.prior is None:
        return
    if config.task == "kontext" or (config.task == "fill" and config.layout != "inpaint"):
        raise ValueError("class_images is set but the task edits pairs: leave it empty, it is for inpainting")


def prepare(task: Any, config: Any, processes: Processes, progress: Progress) -> None:
    """Have the model make the class images that are missing, each process its share.

    task: of `tasks/`, with its encoders loaded; its denoiser is loaded if it is needed.
    """
    prior = config.prior
    if prior is None or (there := len(class_files(prior.folder))) >= prior.count:
        return
    task.text_to_device()
    task.make_host(task.load_denoiser())
    numbers = list(range(there, prior.count))[processes.rank :: processes.world]
    folder = Path(prior.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        text = {k: v.float() for k, v in task.encode_text([prior.prompt]).items()}
    for number in progress(numbers, "class images"):
        _save(folder, number, _make(task, config, number, text))
    processes.wait()


@torch.no_grad()
def _make(task: Any, config: Any, number: int, text: dict[str, torch.Tensor]) -> torch.Tensor:
    """Class image `number`, [1,H,W,3] in 0..1."""
    side = config.resolution
    generator = row_generator(config.seed, number, "class picture")
    pixels = torch.rand(3, side, side, generator=generator) * 2 - 1
    batch = task.encode_images([Preprocessed(pixels, config.prior.prompt, torch.ones(1, side, side))])
    batch = {k: v.to(task.device) for k, v in (batch | text).items()}
    batch = task.guided(batch, task.encode_text, config.sample_guidance)
    noise = row_noise(config.seed, [(1 << 41) + number], tuple(batch["latents"].shape[1:]))
    return task.sample(batch, noise.to(task.device))


def _save(folder: Path, number: int, image: torch.Tensor) -> None:
    """As PNG, whole or not at all; the name holds the number and the start of the content's hash."""
    made = to_pil(image[0])
    digest = hashlib.sha1(made.tobytes()).hexdigest()[:10]
    partial = folder / f"{number:05d}.part"
    made.save(partial, format="PNG")
    partial.replace(folder / f"{number:05d}-{digest}.png")
