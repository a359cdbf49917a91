"""Prior preservation: the class pictures that keep a subject from swallowing its class (DreamBooth).

The model itself makes them before it is trained, by inpainting a fully masked picture of noise; a folder that
holds enough is left as it is. They join the data as rows marked `prior`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ...models.image_files import looks_like_image
from ..runtime.fingerprints import stamp
from ..runtime.processes import Processes
from ..runtime.random_streams import row_generator, row_noise
from .folders import visible_files
from .preprocess import Arranged
from .sample import Sample, read_image, read_size, to_pil
from .sources import Source


class ClassPictures:
    """The first `count` pictures of a folder, all with one prompt and marked `prior`."""

    def __init__(self, folder: str | Path, prompt: str, count: int):
        self.prompt, self.files = prompt, class_files(folder)[:count]
        sizes = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
        self.fingerprint = stamp("class", prompt, sizes)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def size(self, index: int) -> tuple[int, int]:
        return read_size(self.files[index], self.name(index))

    def __getitem__(self, index: int) -> Sample:
        name = self.name(index)
        return Sample(self.prompt, read_image(self.files[index], name), name=name, role="class")


class Chain:
    """Sources one after the other."""

    def __init__(self, *sources: Source):
        self.sources = sources
        self.fingerprint = stamp(*(source.fingerprint for source in sources))

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def _at(self, index: int) -> tuple[Source, int]:
        for source in self.sources:
            if index < len(source):
                return source, index
            index -= len(source)
        raise IndexError(index)

    def name(self, index: int) -> str:
        source, inner = self._at(index)
        return source.name(inner)

    def size(self, index: int) -> tuple[int, int]:
        source, inner = self._at(index)
        return source.size(inner)

    def __getitem__(self, index: int) -> Sample:
        source, inner = self._at(index)
        return source[inner]


def class_files(folder: str | Path) -> list[Path]:
    """Pictures of a folder in name order; none if there is no folder."""
    path = Path(folder)
    return [p for p in visible_files(path) if looks_like_image(p)] if path.is_dir() else []


@torch.no_grad()
def top_up(
    task: Any, config: Any, progress: Callable[[Iterable, str], Iterable], rank: int = 0, world: int = 1
) -> int:
    """Make this process' share of the class pictures that are missing; returns how many it made.

    `task` has its encoders and its host (`make_host`) ready. Names hold the number and the start of the
    content's hash.
    """
    wanted, side = config.prior, config.resolution
    folder = Path(wanted.folder)
    missing = range(len(class_files(folder)), wanted.count)
    text = {k: v.float() for k, v in task.encode_text([wanted.prompt]).items()}
    mine = list(missing)[rank::world]
    folder.mkdir(parents=True, exist_ok=True)
    for number in progress(mine, "class pictures"):
        generator = row_generator(config.seed, number, "class picture")
        pixels = torch.rand(3, side, side, generator=generator) * 2 - 1
        batch = task.encode_images([Arranged(pixels, wanted.prompt, torch.ones(1, side, side))])
        batch = {k: v.to(task.device) for k, v in (batch | text).items()}
        batch = task.guided(batch, task.encode_text, config.sample_guidance)
        noise = row_noise(config.seed, [(1 << 41) + number], tuple(batch["latents"].shape[1:]))
        picture = to_pil(task.sample(batch, noise.to(task.device))[0])
        digest = hashlib.sha1(picture.tobytes()).hexdigest()[:10]
        partial = folder / f"{number:05d}.part"
        picture.save(partial, format="PNG")
        partial.replace(folder / f"{number:05d}-{digest}.png")
    return len(mine)


def prepare(
    task: Any, config: Any, processes: Processes, progress: Callable[[Iterable, str], Iterable]
) -> None:
    """Before anything is trained, the model makes the class images that are missing."""
    if config.prior is None or len(class_files(config.prior.folder)) >= config.prior.count:
        return
    task.text_to_device()
    task.make_host(task.load_denoiser())
    top_up(task, config, progress, processes.rank, processes.world)
    processes.wait()


def check(config: Any) -> None:
    """Raises ValueError where prior preservation is asked for but cannot be done."""
    if config.prior is None:
        return
    if config.task == "kontext" or (config.task == "fill" and config.layout != "inpaint"):
        raise ValueError("class_images is set but the task edits pairs: leave it empty, it is for inpainting")


def with_class(source: Source, config: Any) -> Source:
    """The source, followed by the class pictures if there are any to use."""
    if config.prior is None:
        return source
    return Chain(source, ClassPictures(config.prior.folder, config.prior.prompt, config.prior.count))
