"""What training leaves behind: a LoRA file that every loader reads alike, or a complete diffusers folder.

The file format is `models/lora/save.py`'s; here trained tensors are brought into its canonical form.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.tiny.folders import forget_origin
from ..runtime import disk
from ..runtime.processes import Processes
from .adapters import file_name, trained_parameters, trained_state
from .families import FAMILIES


def lora_weights(tensors: Mapping[str, Tensor], config: Any) -> Any:
    """Trained tensors under their file names (`adapters.trained_state`) as `models.lora`'s canonical form."""
    from ...models.lora.weights import LoraInfo, LoraWeights, LowRank, MoeLowRank

    scale = config.alpha / config.rank
    paths: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, rest = name.partition(".lora_")
        paths.setdefault(path, {})[rest.removesuffix(".weight")] = tensor
    modules: dict[str, Any] = {}
    for path, parts in paths.items():
        if "route" not in parts:
            modules[path] = LowRank(parts["A"], parts["B"], scale, "recipe")
            continue
        experts = range(sum(name.startswith("A.") for name in parts))
        down, up = (torch.stack([parts[f"{side}.expert_{i}"] for i in experts]) for side in "AB")
        modules[path] = MoeLowRank(
            down, up, parts["route"], scale, "recipe", config.moe_gate, config.moe_top_k
        )
    base = FAMILIES[config.task].lora_base
    return LoraWeights(modules, {}, LoraInfo("diptych", base, config.rank, config.alpha, "recipe"))


def save_lora(
    path: Path,
    parts: dict[str, dict[str, Tensor]],
    config: Any,
    header: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write one LoRA file; returns where it is: elsewhere, which is said, if the path cannot be written.

    parts: denoiser (and text encoder) -> names and tensors of `trained_state`. header: the `diptych` block
    (base, recipe, steps, data hash, prompt template; the gate is added). dtype: of the tensors in the file.
    """
    from ...models.lora.save import save

    denoiser, *texts = parts

    def write(place: Path) -> None:
        save(place, lora_weights(parts[denoiser], config), header, dtype=dtype)
        for name in texts:
            _add_text_encoder(place, parts[name], config, dtype)

    return disk.keep_whole(path, write)


def _add_text_encoder(path: Path, tensors: dict[str, Tensor], config: Any, dtype: torch.dtype) -> None:
    """The CLIP text encoder's LoRA beside the UNet's, in kohya's naming."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ...models.lora.save import sort_header

    with safe_open(path, framework="pt") as file:
        header, flat = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    for name, tensor in tensors.items():
        module, _, rest = name.partition(".lora_")
        # transformers 5 dropped the level that files still name.
        key = "lora_te_text_model_" + module.removeprefix("text_model.").replace(".", "_")
        side = "down" if rest.startswith("A") else "up"
        flat[f"{key}.lora_{side}.weight"] = tensor.to(dtype).contiguous()
        flat[f"{key}.alpha"] = torch.tensor(float(config.alpha))
    partial = path.with_name(path.name + ".part")
    save_file(flat, partial, metadata=header)
    sort_header(partial)
    os.replace(partial, path)


def save_pipeline(
    folder: Path,
    model: str,
    parts: dict[str, nn.Module],
    states: dict[str, dict[str, Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
    pipeline: str = "",
) -> Path:
    """A complete diffusers folder: the trained parts, the rest copied from a local base; returns where it is.

    From a hub base only the trained parts and their configs are written. states: gathered weights of sharded
    parts. dtype: of the trained parts' files. pipeline: the class in model_index.json, the base's if empty.
    """

    def fill(place: Path) -> None:
        _fill_pipeline(place, model, parts, states, dtype)
        if pipeline:
            _name_pipeline(place, pipeline)

    return disk.keep(folder, lambda place: _write_folder(place, fill))


def _name_pipeline(folder: Path, pipeline: str) -> None:
    """A text-to-image base of which an inpainting model was made still names its own class."""
    path = folder / "model_index.json"
    if path.is_file():
        content = {**json.loads(path.read_text(encoding="utf-8")), "_class_name": pipeline}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Beside its place first; an earlier folder there stays whole until the new one is."""
    folder, old = final.with_name(f".{final.name}.part"), final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():  # killed between the two renames below
        os.replace(old, final)
    for leftover in (folder, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        fill(folder)
        if final.exists():
            os.replace(final, old)
        os.replace(folder, final)
    finally:
        for leftover in (folder, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _fill_pipeline(
    folder: Path,
    model: str,
    parts: dict[str, nn.Module],
    states: dict[str, dict[str, Tensor]] | None,
    dtype: torch.dtype,
) -> None:
    """Copy what is not trained of a local base, and write the trained parts in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    base = Path(model)
    if base.is_dir() and "." not in parts:  # which is the whole folder
        for item in sorted(base.iterdir()):
            if item.name in parts or item.resolve() == folder.resolve():
                continue
            if item.is_dir():
                shutil.copytree(item, folder / item.name, dirs_exist_ok=True)
            elif item.suffix == ".json":
                shutil.copy2(item, folder / item.name)
    for name, module in parts.items():
        if states is not None and hasattr(module, "config_name"):  # diffusers: weights from the module only
            module = type(module).from_config(module.config)
            module.load_state_dict(states[name])
        elif dtype != torch.float32:
            module = copy.deepcopy(module)
        module.to(dtype).save_pretrained(folder / name)
    forget_origin(folder)


def part_tensors(module: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Float32 CPU copies of the trained tensors of a module; from the gathered `state` if it is sharded."""
    if state is None:
        return trained_state(module)
    wanted = trained_parameters(module)
    return {file_name(k): v.detach().float().cpu() for k, v in state.items() if file_name(k) in wanted}


def write_run(
    config: Any,
    output: Path,
    parts: dict[str, nn.Module],
    prepared: dict[str, nn.Module],
    processes: Processes,
    header: dict[str, Any],
) -> Path:
    """A run's weights in `output`, as a LoRA file or a diffusers folder; all processes call it, the main one
    writes.

    parts: what was trained, denoiser first. prepared: the same as accelerate wraps them. header: see
    `save_lora`.
    """
    full, dtype = config.method == "full", getattr(torch, config.save_dtype)
    path = output / ("model" if full else f"{config.output_name or config.recipe or config.task}.safetensors")
    states: dict[str, Any] = dict.fromkeys(parts)
    if processes.sharded:  # gathering is a collective
        states = {name: processes.accelerator.get_state_dict(part) for name, part in prepared.items()}
    if not processes.main:
        return path
    if full:
        gathered, pipeline = states if processes.sharded else None, FAMILIES[config.task].pipeline
        return save_pipeline(path, config.model, parts, gathered, dtype, pipeline)
    tensors = {name: part_tensors(module, states[name]) for name, module in parts.items()}
    return save_lora(path, tensors, config, header, dtype)
