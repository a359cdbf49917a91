"""What training leaves behind: a LoRA file that every loader reads alike, or a complete diffusers folder.

LoRA files carry diffusers names with the scale folded into the matrices (alpha = rank), so a reader that
ignores
alpha gets the same weights; SD1.5 files carry kohya names, the only ones ComfyUI's core reads there.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import file_name, trained_parameters, trained_state


def folded(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A and B each times sqrt(scale): B A becomes scale B A. Routers are left alone."""
    root = abs(scale) ** 0.5
    return {k: v if "lora_route" in k else v.float() * root for k, v in tensors.items()}


def kohya_names(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`a.b.lora_A.weight` to `<prefix>_a_b.lora_down.weight`, with an alpha per module equal to its rank."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, side = name.removesuffix(".weight").rpartition(".")
        module = f"{prefix}_{path.replace('.', '_')}"
        if side == "lora_A":
            out[f"{module}.lora_down.weight"] = tensor
            out[f"{module}.alpha"] = torch.tensor(float(tensor.shape[0]))
        else:
            out[f"{module}.lora_up.weight"] = tensor
    return out


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=header)
    os.replace(temporary, path)


def save_lora(
    path: Path,
    parts: dict[str, dict[str, Tensor]],
    *,
    scale: float,
    rank: int,
    header: dict[str, Any],
    kohya: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write one LoRA file. parts: {"transformer": {...}, "text_encoder": {...}} with names of
    `trained_parameters`.

    header: the `diptych` block (base, recipe, steps, data hash, prompt template, MoE gate).
    """
    flat: dict[str, Tensor] = {}
    adapter: dict[str, Any] = {}
    kohya_prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}
    for part, tensors in parts.items():
        tensors = {k: v.to(dtype) for k, v in folded(tensors, scale).items()}
        if kohya:
            flat |= kohya_names(tensors, kohya_prefix[part])
        else:
            flat |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
            targets = sorted({n.split(".lora_")[0] for n in tensors})
            adapter |= {f"{part}.r": rank, f"{part}.lora_alpha": rank, f"{part}.target_modules": targets}
    metadata = {"format": "pt", "diptych": json.dumps(header, sort_keys=True)}
    if kohya:
        metadata |= {
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(rank),
            "ss_network_module": "networks.lora",
        }
    else:
        metadata["lora_adapter_metadata"] = json.dumps(adapter, sort_keys=True)
    _write(path, flat, metadata)
    return path


def save_pipeline(
    folder: Path, model: str, parts: dict[str, nn.Module], states: dict[str, dict[str, Tensor]] | None = None
) -> Path:
    """A complete diffusers folder: the trained parts, everything else copied from a local base `model`.

    From a hub base only the trained parts and their configs are written. states: gathered weights of sharded
    parts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = Path(model)
    if base.is_dir():
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
        module.save_pretrained(folder / name)
    return folder


def part_tensors(module: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copies of the trained tensors of a module; from the gathered `state` if the module is sharded."""
    if state is None:
        return trained_state(module)
    wanted = trained_parameters(module)
    return {file_name(k): v.detach().float().cpu() for k, v in state.items() if file_name(k) in wanted}
