"""A training as a person orders it with a few choices, and the recipe that follows from them.

What the ComfyUI nodes and scripts share; `session.py` runs it. The run's folder is named after the choices,
so the same choices find their checkpoints again and go on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..models.flux import default_device, read_config
from .config import TrainConfig
from .recipes import from_dict, read
from .reinforce.config import GRPOConfig
from .rewards import from_recipe
from .runtime import disk

RECIPES = {"fill": "icedit", "kontext": "kontext", "sd_inpaint": "sd_inpaint_dreambooth"}
PRESETS = {
    "fast": "grpo_fast",
    "winner": "grpo_winner",
    "flow-grpo": "grpo_flow",
    "dance": "grpo_dance",
    "mixgrpo": "grpo_mixgrpo",
    "nft": "grpo_nft",
}
PRECISIONS = ("auto", "bfloat16", "float8_e4m3fn", "float32")
GUIDANCE = {"fill": 30.0, "kontext": 2.5, "sd_inpaint": 1.0}  # of rollouts
SMALL = 64 << 20  # bytes of weights below which a model is a toy: trained in float32 without checkpointing
ROOMY = 40 << 30  # bytes of GPU memory from which FLUX's base is kept in bfloat16 instead of fp8
LARGE = 768  # pixels from which the VAE's activations would be the peak of memory
TOY_BATCH = 48  # rollouts of a toy model in one pass


@dataclass(frozen=True)
class Choices:
    """Of a supervised training. 0, "" and "auto" leave a value to the recipe and the model.

    data: a spec of `data/sources.py`; model: a diffusers folder; name: of the LoRA file, without extension.
    """

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

    kind: ClassVar[type[TrainConfig]] = TrainConfig

    def folder(self) -> str:
        """Of the run: everything that shapes the weights except how long it runs."""
        free = ("steps", "save_every", "preview_every", "name")
        shaping = {key: value for key, value in asdict(self).items() if key not in free}
        return f"{self.name}-{hashlib.sha256(json.dumps(shaping).encode()).hexdigest()[:8]}"

    def base_recipe(self, task: str) -> str:
        """The bundled recipe that the choices are laid over, for a model of this family."""
        return RECIPES[task] if self.recipe == "auto" else self.recipe

    def check(self) -> None:
        """Raise ValueError for a name that is no plain file name, or a precision there is not."""
        disk.check_name(self.name, "output name")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}: use one of {', '.join(PRECISIONS)}")

    def own(self, values: dict[str, Any], folder: Path, task: str, small: bool) -> dict[str, Any]:
        """What this kind of training sets beside the common values, of which `values` are what is set."""
        own = {
            "log_every": max(1, min(10, self.steps // 50)),
            "sample_count": 2,
            "class_images": f"{folder / 'class'}?prompt={self.class_prompt}@1" if self.class_prompt else "",
            "optimizer": "adamw",
            "lr": self.lr or (1e-3 if small else 1e-4),
            "lora_alpha": None,
        }
        if small:
            own |= {"batch_size": 8, "accumulation": 1}
            own["sample_steps"] = min(values.get("sample_steps", TrainConfig.sample_steps), 12)
        if self.batch_size:
            own["batch_size"] = self.batch_size
        if values.get("resolution", TrainConfig.resolution) > LARGE:
            own["encode_batch"] = 1
        return own


@dataclass(frozen=True)
class RewardChoices(Choices):
    """Of a reward training; of the common ones `recipe`, `batch_size` and `class_prompt` say nothing.

    preset: one of `PRESETS`. rewards, reward_options: as a recipe writes them. start: a LoRA merged into the
    base before training.
    """

    preset: str = "fast"
    rewards: tuple[str, ...] = ()
    reward_options: tuple[str, ...] = ()
    start: str = ""
    group_size: int = 0
    groups: int = 0

    kind: ClassVar[type[TrainConfig]] = GRPOConfig

    def base_recipe(self, task: str) -> str:
        """The preset, for models of every family."""
        return PRESETS[self.preset]

    def check(self) -> None:
        """As of `Choices`; also for a preset there is not, and a reward that cannot be loaded."""
        super().check()
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}: use one of {', '.join(PRESETS)}")
        from_recipe(self.rewards, self.reward_options).check()

    def own(self, values: dict[str, Any], folder: Path, task: str, small: bool) -> dict[str, Any]:
        """As of `Choices`."""
        own: dict[str, Any] = {
            "rewards": list(self.rewards),
            "reward_options": list(self.reward_options),
            "fuse_loras": [self.start] if self.start else [],
            "log_every": 1,
            "sample_count": 4,
            "rollout_guidance": GUIDANCE[task],
            "sample_guidance": GUIDANCE[task],
        }
        if task == "sd_inpaint":
            own |= {"shared_prefix": False, "shared_noise": False, "eta": None}
        if small:
            own |= self._for_small(values, task)
        chosen = {
            "rank": self.rank,
            "lora_alpha": 2.0 * self.rank,
            "lr": self.lr,
            "group_size": self.group_size,
            "groups_per_update": self.groups,
        }
        return own | {name: value for name, value in chosen.items() if value}

    def _for_small(self, values: dict[str, Any], task: str) -> dict[str, Any]:
        """A toy model: whole groups at once, a small adapter, larger steps."""
        from ..models import tiny

        guidance = tiny.card().get("guidance", {}).get(task, GUIDANCE[task])
        size = self.group_size or values["group_size"]
        return {
            "cache_in_memory": True,
            "micro_batch": size * max(1, TOY_BATCH // size),
            "sample_steps": 12,
            "rollout_guidance": guidance,
            "sample_guidance": guidance,
            "lr": 5e-4,
            "group_clip": 0.3 if values["algorithm"] == "nft" else 0.0,
            "rank": 16,
            "lora_alpha": 32.0,
        }


def configure(choices: Choices, root: Path) -> TrainConfig:
    """The recipe with the choices laid over it; runs and caches lie under `root`.

    A `GRPOConfig` of `RewardChoices`. Raises ValueError for choices that do not go together.
    """
    choices.check()
    return _configured(choices, root)


def automatic(choices: Choices) -> str:
    """What the choices leave to the recipe and the model, in words: "rank 32, learning_rate 0.0003, ...".

    Raises ValueError where recipe and model do not go together.
    """
    c = _configured(choices, Path())
    by_reward = isinstance(c, GRPOConfig)
    own = {"group_size": c.group_size, "groups": c.groups_per_update} if by_reward else {}
    own |= {"rank": c.rank, "learning_rate": _exponent(c.lr), "resolution": c.resolution}
    own |= {} if by_reward else {"batch_size": c.batch_size}
    return ", ".join(f"{name} {value}" for name, value in own.items())


def _exponent(value: float) -> str:
    """3e-4 for 0.0003."""
    digits, _, power = f"{value:e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _configured(choices: Choices, root: Path) -> TrainConfig:
    """As `configure`, of choices that were checked."""
    task, small = task_of(choices.model), is_small(choices.model)
    name, folder = choices.base_recipe(task), root / choices.folder()
    values = read(name)
    trained = values.get("task", task)
    if choices.kind is TrainConfig and trained != task:
        raise ValueError(f"recipe {name} trains {trained} but the base model is {task}: choose recipe auto")
    values |= {
        "task": task,
        "model": str(choices.model),
        "data": [choices.data],
        "output_name": choices.name,
        "output_dir": str(folder),
        "cache_dir": str(root / "cache"),
        "max_steps": choices.steps,
        "seed": choices.seed,
        "resume": "auto",
        "log_with": ["none"],
        "save_every": choices.save_every,
        "sample_every": choices.preview_every,
        "base_dtype": _precision(choices.precision, task, small),
    }
    if small:
        values |= {"resolution": 64, "gradient_checkpointing": False, "cache_dtype": "float32"}
    if choices.resolution:
        values["resolution"] = choices.resolution
    if choices.rank:
        values["rank"] = choices.rank
    if default_device().type == "cpu" or values["base_dtype"] == "float32":
        values["mixed_precision"] = "no"
    return from_dict(values | choices.own(values, folder, task, small), choices.kind)


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
    """Whether a diffusers folder holds a toy: weights of less than `SMALL` bytes. A hub id is none."""
    files = [file for part in ("transformer", "unet") for file in (Path(model) / part).glob("*.safetensors")]
    return 0 < sum(file.stat().st_size for file in files) < SMALL


def _precision(asked: str, task: str, small: bool) -> str:
    """What the frozen base is kept in."""
    if asked != "auto":
        return asked
    if small:
        return "float32"
    if default_device().type == "cuda" and task != "sd_inpaint" and torch.cuda.mem_get_info()[1] < ROOMY:
        return "float8_e4m3fn"
    return "bfloat16"
