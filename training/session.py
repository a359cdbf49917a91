"""One training run as a person orders it with a few choices: from choices to a recipe, a LoRA file and a
report.

What the ComfyUI node and scripts share. Knows no ComfyUI (`comfy.py` does); the training itself is `sft.py`.
The run's folder is named after the choices, so the same choices find their checkpoints again and go on.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.flux import read_config
from .config import TrainConfig, load
from .evaluate import plots
from .runtime import disk

RECIPES = {"fill": "icedit", "kontext": "kontext", "sd_inpaint": "sd_inpaint_dreambooth"}
PRECISIONS = ("auto", "bfloat16", "float8_e4m3fn", "float32")
SMALL = 64 << 20  # bytes of weights below which a model is a toy: trained in float32 without checkpointing
ROOMY = 40 << 30  # bytes of GPU memory from which FLUX's base is kept in bfloat16 instead of fp8


@dataclass(frozen=True)
class Choices:
    """0 or "auto" leave a value to the recipe and the model. `data` is a spec of `data/sources.py`."""

    data: str
    model: str
    name: str
    recipe: str = "auto"
    steps: int = 500
    rank: int = 0
    lr: float = 0.0
    resolution: int = 0
    batch_size: int = 0
    seed: int = 0
    precision: str = "auto"
    save_every: int = 100
    preview_every: int = 100
    class_prompt: str = ""

    def folder(self) -> str:
        """Of the run: everything that shapes the weights except how long it runs."""
        free = ("steps", "save_every", "preview_every", "name")
        shaping = {key: value for key, value in asdict(self).items() if key not in free}
        return f"{self.name}-{hashlib.sha256(json.dumps(shaping).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Outcome:
    """What a run left: the LoRA file (None if it was stopped early), pictures as IMAGE, a report."""

    lora: Path | None
    step: int
    curve: Tensor
    samples: Tensor | None
    report: str


def task_of(model: str | Path) -> str:
    """Which family a diffusers folder belongs to: fill, kontext or sd_inpaint. ValueError for others."""
    for part, by_channels in (("transformer", {384: "fill", 64: "kontext"}), ("unet", {9: "sd_inpaint"})):
        path = Path(model) / part / "config.json"
        if path.is_file():
            channels = read_config(path).get("in_channels")
            if channels in by_channels:
                return by_channels[channels]
            raise ValueError(
                f"base model {model} takes {channels} channels: choose FLUX Fill, Kontext or SD inpainting"
            )
    raise ValueError(
        f"base model {model} is no diffusers folder: it needs transformer/ or unet/ with a config.json"
    )


def is_small(model: str | Path) -> bool:
    files = [file for part in ("transformer", "unet") for file in (Path(model) / part).glob("*.safetensors")]
    return 0 < sum(file.stat().st_size for file in files) < SMALL  # 0: a hub id, of any size


def check_name(choices: Choices) -> None:
    """Raise ValueError for a name that is no plain file name, or a precision there is not."""
    disk.check_name(choices.name, "output name")
    if choices.precision not in PRECISIONS:
        raise ValueError(f"precision is {choices.precision!r}: use one of {', '.join(PRECISIONS)}")


def configure(choices: Choices, root: Path) -> TrainConfig:
    """The recipe with the choices laid over it. Raises ValueError for choices that do not go together."""
    task = task_of(choices.model)
    check_name(choices)
    recipe = RECIPES[task] if choices.recipe == "auto" else choices.recipe
    config = load(recipe)
    if config.task != task:
        raise ValueError(
            f"recipe {recipe} trains {config.task} but the base model is {task}: choose recipe auto"
        )
    small, device = is_small(choices.model), _device()
    config.model, config.data, config.output_name = str(choices.model), [choices.data], choices.name
    config.output_dir, config.cache_dir = str(root / choices.folder()), str(root / "cache")
    config.max_steps, config.seed, config.resume, config.log_with = (
        choices.steps,
        choices.seed,
        "auto",
        ["none"],
    )
    config.save_every, config.sample_every = choices.save_every, choices.preview_every
    config.log_every, config.sample_count = max(1, min(10, choices.steps // 50)), 2
    folder = root / choices.folder() / "class"
    config.class_images = f"{folder}?prompt={choices.class_prompt}@1" if choices.class_prompt else ""
    config.optimizer, config.lr = "adamw", choices.lr or (1e-3 if small else 1e-4)
    config.rank, config.lora_alpha = choices.rank or config.rank, None
    config.batch_size = choices.batch_size or (8 if small else config.batch_size)
    config.resolution = choices.resolution or (64 if small else config.resolution)
    if config.resolution > 768:
        config.encode_batch = 1  # the VAE's activations would be the peak
    config.base_dtype = _precision(choices.precision, task, small, device)
    if small:
        config.gradient_checkpointing, config.cache_dtype, config.accumulation = False, "float32", 1
        config.sample_steps = min(config.sample_steps, 12)
    if device == "cpu" or config.base_dtype == "float32":
        config.mixed_precision = "no"
    config.__post_init__()
    return config


def _device() -> str:
    from ..models.flux import default_device

    return default_device().type


def _precision(wanted: str, task: str, small: bool, device: str) -> str:
    if wanted != "auto":
        return wanted
    if small:
        return "float32"
    if device == "cuda" and task != "sd_inpaint" and torch.cuda.mem_get_info()[1] < ROOMY:
        return "float8_e4m3fn"
    return "bfloat16"


@contextlib.contextmanager
def own_process_state(cpu: bool = False) -> Iterator[None]:
    """Keep torch's random state and accelerate's process-wide state out of the program that hosts the
    training.

    cpu: train on the CPU even where there is a GPU.
    """
    from accelerate.state import AcceleratorState, GradientState

    before = os.environ.get("ACCELERATE_USE_CPU")
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with torch.random.fork_rng():
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            if cpu and before is None:
                del os.environ["ACCELERATE_USE_CPU"]
            gc.collect()


def train(
    config: TrainConfig,
    *,
    on_step: Callable[[int, int, Tensor], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[Iterable, str], Iterable] | None = None,
    cpu: bool = False,
) -> Outcome:
    """Run (or go on with) a training in this process.

    on_step(step, steps, preview): after every report, with the loss curve above the latest samples, [H,W,3].
    should_stop: asked after every step; a checkpoint is written before the run ends. progress wraps the
    caching loops. cpu: train there even if there is a GPU.
    """
    from .trainer import Trainer

    folder = Path(config.output_dir)
    history = _history(folder)
    sheets: list[Tensor] = []

    def on_report(report: Any) -> None:
        history[report.step] = report.loss
        if on_step is not None:
            on_step(report.step, report.steps, preview(history, sheets[-1:]))

    trainer = Trainer(
        config,
        on_report=on_report,
        on_sample=lambda step, sheet: sheets.append(sheet),
        should_stop=should_stop,
        progress=progress,
    )
    with own_process_state(cpu):
        path = trainer.run()
        step, notes = trainer.step, trainer.notes
        del trainer
    finished = step >= config.max_steps and path.suffix == ".safetensors"
    curve = plots.as_image(plots.curve(list(history.values()), steps=list(history), title="loss"))
    return Outcome(
        path if finished else None,
        step,
        curve,
        sheets[-1][None] if sheets else None,
        _report(config, step, history, path if finished else None, notes),
    )


def preview(history: dict[int, float], sheets: list[Tensor], title: str = "loss") -> Tensor:
    """[H,W,3]: the curve, and below it the samples at its width if there are any."""
    curve = plots.as_image(plots.curve(list(history.values()), steps=list(history), title=title))[0]
    if not sheets:
        return curve
    width = curve.shape[1]
    height = max(1, round(sheets[0].shape[0] * width / sheets[0].shape[1]))
    sheet = torch.nn.functional.interpolate(sheets[0].movedim(-1, 0)[None], (height, width), mode="nearest")
    return torch.cat([curve, sheet[0].movedim(0, -1)])


def _history(folder: Path) -> dict[int, float]:
    """Losses by step of the earlier parts of this run."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return {}
    history = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError):
            row = json.loads(line)
            history[int(row["step"])] = float(row["loss"])
    return dict(sorted(history.items()))


def _report(
    config: TrainConfig, step: int, history: dict[int, float], lora: Path | None, notes: Sequence[str] = ()
) -> str:
    values = list(history.values())
    tenth = max(1, len(values) // 10)
    lines = [
        f"{'trained' if lora else 'stopped at'} {step} of {config.max_steps} steps: {config.recipe}, "
        f"rank {config.rank}, "
        f"{config.optimizer} {config.lr:g}, {config.resolution} px, batch {config.batch_size} x "
        f"{config.accumulation}",
        f"base: {config.model} ({config.base_dtype})",
        f"data: {', '.join(config.data)}",
        *notes,
    ]
    if values:
        first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
        lines.append(f"loss: {first:.4f} at the start, {last:.4f} at the end")
    if lora is None:
        lines.append(f"run the node again with the same settings to go on from the checkpoint of step {step}")
    lines.append(f"run folder: {config.output_dir}")
    return "\n".join(lines)


def publish(lora: Path, folder: Path, run: Path) -> Path:
    """Copy a finished LoRA into a folder of LoRAs and return where.

    The same run overwrites its own earlier file; a file of another origin is never overwritten: a number is
    added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = run / "published.txt"
    known = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
    target = folder / lora.name
    number = 2
    while target.exists() and target.name != known:
        target = folder / f"{lora.stem}_{number}{lora.suffix}"
        number += 1
    try:
        disk.write_whole(target, lambda place: shutil.copyfile(lora, place))
    except OSError as error:
        raise ValueError(
            f"the LoRA is whole in {lora}, but cannot be copied to {folder} ({disk.reason(error)}): copy it"
        ) from error
    note.write_text(target.name, encoding="utf-8")
    return target
