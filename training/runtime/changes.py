"""Which options of a recipe may change between a checkpoint and the run that goes on from it.

Three kinds: what shapes the weights, their optimiser or the order of the data cannot change; what says where
results go and how often one looks can, unsaid; everything else can, and is named.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ...models.lora.files import with_strength
from .fingerprints import files_stamp, stamp

# Options with which the saved weights, moments or places in the data would mean something else.
FIXED = {
    *("task", "method", "model", "init", "init_from", "init_lora", "fuse_loras", "train_text_encoder"),
    *("rank", "lora_alpha", "target_modules", "moe_experts", "moe_top_k", "moe_gate"),
    *("optimizer", "seed", "batch_size", "algorithm", "stage", "joint", "words"),
}
# Options that leave every weight as it would have been.
FREE = {
    *("output_dir", "output_name", "recipe", "save_dtype", "resume", "save_every", "keep_last"),
    *("cache", "cache_dir", "cache_in_memory", "encode_batch", "threads", "log_every", "log_with"),
    *("sample_data", "sample_every", "sample_count", "sample_steps", "sample_guidance"),
    *("gradient_checkpointing", "groups_per_update"),  # the latter is the batch_size of reward training
}
PATHS = ("model", "init_from", "init_lora", "fuse_loras")  # compared by content: folders may move


def stamps(config: Any, denoiser: str) -> dict[str, str]:
    """A short hash of what every option of `PATHS` names on this disk; "" for a hub id or an empty option."""
    out = {}
    for name in PATHS:
        value = getattr(config, name)
        texts = value if isinstance(value, list) else [value]
        out[name] = stamp(*(_content(name, text, denoiser) for text in texts)) if any(texts) else ""
    return out


def _content(name: str, text: str, denoiser: str) -> Any:
    where, strength = with_strength(text) if name == "fuse_loras" else (text, 1.0)
    path = Path(where)
    if path.is_file():
        return _file(path), strength
    folder = path / denoiser if name in ("model", "init_from") else path
    return (files_stamp(folder) if folder.is_dir() else text), strength


def _file(path: Path, sample: int = 1 << 16) -> tuple[int, bytes]:
    with open(path, "rb") as file:
        return path.stat().st_size, file.read(sample)


def check(state: dict[str, Any], config: Any, world: int, content: dict[str, str], folder: Path) -> list[str]:
    """Compare a checkpoint's recipe with the present one; returns what changed, in sentences.

    content: `stamps` of the present recipe. Raises ValueError naming every option that cannot change.
    """
    neutral = config.neutral()  # of options that only one of the two may have
    before, now = neutral | state["config"], neutral | dataclasses.asdict(config)
    for values in (before, now):
        if values.get("lora_alpha") is None:
            values["lora_alpha"] = float(values["rank"])
    rows = before["batch_size"] * state["world"], now["batch_size"] * world
    changed = {name for name in before.keys() & now.keys() if before[name] != now[name]} - FREE
    known = state.get("files_of_config", {})
    changed -= {name for name in PATHS if known.get(name) and known.get(name) == content.get(name)}
    changed |= {name for name in PATHS if known.get(name, content[name]) != content[name]}
    changed.discard("batch_size")
    if now["lr_schedule"] == before["lr_schedule"] == "constant":
        changed.discard("max_steps")
    told = {name: f"{name} {_short(before[name])} -> {_short(now[name])}" for name in sorted(changed)}
    if rows[0] != rows[1]:
        name = "groups_per_update" if "groups_per_update" in now else "batch_size"
        remedy = f"(set {name}: {max(1, rows[0] // world)})"
        told["batch_size"] = f"rows per step over all processes {rows[0]} -> {rows[1]} {remedy}"
    if refused := [told[name] for name in told if name in FIXED]:
        raise ValueError(
            f"{folder} cannot go on with another recipe: {'; '.join(refused)}. Set it back, or choose "
            "another output_dir"
        )
    sentences = []
    if told:
        sentences.append(f"the recipe changed since {folder}: {'; '.join(told.values())}")
    if old := sorted(before.keys() - now.keys()):
        sentences.append(
            f"{folder} is of an earlier version, whose {', '.join(old)} are gone or written otherwise: they "
            "are not compared"
        )
    if state["world"] != world:
        sentences.append(f"{folder} is of {state['world']} processes, now there are {world}")
    if state["step"] > config.max_steps:
        sentences.append(f"{folder} is beyond max_steps {config.max_steps}: nothing is left to train")
    return sentences


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
