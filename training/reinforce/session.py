"""One reward-training run as a person orders it: choices to a recipe, a LoRA file, a curve, before and after.

What the ComfyUI node orders; the counterpart of `session.py`, whose run folders and previews it shares. The
training itself is `grpo.py`, data without wanted pictures `given.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import config, session
from ..evaluate import plots
from ..rewards import from_recipe
from .config import GRPOConfig

PRESETS = {
    "fast": "grpo_fast",
    "winner": "grpo_winner",
    "flow-grpo": "grpo_flow",
    "dance": "grpo_dance",
    "mixgrpo": "grpo_mixgrpo",
    "nft": "grpo_nft",
}
GUIDANCE = {"fill": 30.0, "kontext": 2.5, "sd_inpaint": 1.0}
SHOWN = 4  # rows of a preview
TOY_BATCH = 48  # samples of a toy model in one pass


@dataclass(frozen=True)
class Choices(session.Choices):
    """0, "" and "auto" leave a value to the preset and the model.

    rewards, reward_options: as a recipe writes them. start: a LoRA merged into the base before training.
    sources_only: the data has no wanted pictures, and rewards see none.
    """

    preset: str = "fast"
    rewards: tuple[str, ...] = ()
    reward_options: tuple[str, ...] = ()
    start: str = ""
    group_size: int = 0
    groups: int = 0
    sources_only: bool = False


def configure(choices: Choices, root: Path) -> GRPOConfig:
    """The preset with the choices laid over it. Raises ValueError for choices that do not go together."""
    if choices.preset not in PRESETS:
        raise ValueError(f"preset is {choices.preset!r}: use one of {', '.join(PRESETS)}")
    session.check_name(choices)
    from_recipe(choices.rewards, choices.reward_options).check()
    task = session.task_of(choices.model)
    small, device = session.is_small(choices.model), session._device()
    folder = root / choices.folder()
    values: dict[str, Any] = config.read(PRESETS[choices.preset])
    values |= {
        "task": task,
        "recipe": PRESETS[choices.preset],
        "model": str(choices.model),
        "data": [choices.data],
        "rewards": list(choices.rewards),
        "reward_options": list(choices.reward_options),
        "use_targets": not choices.sources_only,
        "fuse_loras": [choices.start] if choices.start else [],
        "output_name": choices.name,
        "output_dir": str(folder),
        "cache_dir": str(root / "cache"),
        "max_steps": choices.steps,
        "seed": choices.seed,
        "resume": "auto",
        "log_with": ["none"],
        "log_every": 1,
        "save_every": choices.save_every,
        "sample_every": choices.preview_every,
        "sample_count": SHOWN,
        "rollout_guidance": GUIDANCE[task],
        "sample_guidance": GUIDANCE[task],
        "resolution": choices.resolution or (64 if small else values["resolution"]),
        "base_dtype": session._precision(choices.precision, task, small, device),
    }
    values |= {
        name: value
        for name, value in (
            ("rank", choices.rank),
            ("lora_alpha", 2.0 * choices.rank),
            ("lr", choices.lr),
            ("group_size", choices.group_size),
            ("groups_per_update", choices.groups),
        )
        if value
    }
    if task == "sd_inpaint":
        values |= {"shared_prefix": False, "shared_noise": False, "eta": -1.0}
    if small:
        values |= _for_small(values, choices)
    if device == "cpu" or values["base_dtype"] == "float32":
        values["mixed_precision"] = "no"
    return config.from_dict(values, GRPOConfig)


def _for_small(values: dict[str, Any], choices: Choices) -> dict[str, Any]:
    """A toy model: whole groups at once, a small adapter, larger steps."""
    from ...models import tiny

    card = tiny.card().get("guidance", {})
    guidance = card.get(values["task"], values["rollout_guidance"])
    size = choices.group_size or values["group_size"]
    return {
        "gradient_checkpointing": False,
        "cache_dtype": "float32",
        "cache_in_memory": True,
        "micro_batch": size * max(1, TOY_BATCH // size),
        "sample_steps": 12,
        "rollout_guidance": guidance,
        "sample_guidance": guidance,
        "lr": choices.lr or 5e-4,
        "group_clip": 0.3 if values["algorithm"] == "nft" else 0.0,
        "rank": choices.rank or 16,
        "lora_alpha": 2.0 * (choices.rank or 16),
    }


def train(
    config: GRPOConfig,
    *,
    on_step: Callable[[int, int, Tensor], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[Iterable, str], Iterable] | None = None,
    cpu: bool = False,
) -> session.Outcome:
    """Run (or go on with) a reward training in this process; arguments as of `session.train`.

    The outcome's curve is the mean reward of the rollouts, its samples the before/after sheet.
    """
    from .before_after import before_after
    from .trainer import GRPOTrainer

    history = reward_history(Path(config.output_dir))
    sheets: list[Tensor] = []

    def on_report(report: Any) -> None:
        if math.isfinite(reward := _reward(trainer.measures)):  # else nothing was judged
            history[report.step] = reward
        if on_step is not None:
            on_step(
                report.step, report.steps, session.preview(history, sheets[-1:], "reward of the rollouts")
            )

    trainer = GRPOTrainer(
        config,
        on_report=on_report,
        on_sample=lambda step, sheet: sheets.append(sheet),
        should_stop=should_stop,
        progress=progress,
    )
    with session.own_process_state(cpu):
        path = trainer.run()
        step, finished = trainer.step, path.suffix == ".safetensors"
        shown = before_after(trainer) if finished else None
    curve = plots.curve(list(history.values()), steps=list(history), title="reward of the rollouts")
    lora = path if finished else None
    report = _report(config, step, history, lora, trainer.notes)
    return session.Outcome(lora, step, plots.as_image(curve), shown, report)


def reward_history(folder: Path) -> dict[int, float]:
    """Mean rewards by update of the earlier parts of a run."""
    file = folder / "rewards.jsonl"
    history = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError, KeyError):
            row = json.loads(line)
            if math.isfinite(reward := _reward(row)):
                history[int(row["step"])] = reward
    return dict(sorted(history.items()))


def _reward(measures: dict[str, float]) -> float:
    values = [value for name, value in measures.items() if name.startswith("reward/")]
    return sum(values) / len(values) if values else float("nan")


def _report(
    c: GRPOConfig, step: int, history: dict[int, float], lora: Path | None, notes: Sequence[str] = ()
) -> str:
    values = list(history.values())
    tenth = max(1, len(values) // 10)
    lines = [
        f"{'trained' if lora else 'stopped at'} {step} of {c.max_steps} updates: {c.recipe} ({c.algorithm}), "
        f"rank {c.rank}, lr {c.lr:g}, {c.groups_per_update} groups of {c.group_size}, "
        f"{c.rollout_steps} sampling steps",
        f"rewards: {', '.join(c.rewards)}",
        f"base: {c.model} ({c.base_dtype})" + (f" with {', '.join(c.fuse_loras)}" if c.fuse_loras else ""),
        f"data: {', '.join(c.data)}",
        *notes,
    ]
    if values:
        first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
        lines.append(f"reward of the rollouts: {first:.4f} at the start, {last:.4f} at the end")
    if lora is None:
        lines.append(f"run the node again with the same settings to go on from the checkpoint of step {step}")
    elif c.fuse_loras:
        lines.append("load it after the LoRA it started from, not instead of it")
    lines.append(f"run folder: {c.output_dir}")
    return "\n".join(lines)
