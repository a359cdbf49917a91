"""Writes a LoRA the way diffusers and ComfyUI both read it, with what it is and how it was trained.

diffusers keys with the scale folded into the factors (so that no reader can lose it), or kohya keys with
`.alpha` for Stable Diffusion UNets, where core ComfyUI takes no other naming.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .weights import LoraError, LoraWeights, LowRank, MoeLowRank

VERSION = 2  # what differed in 1: `about.py`


def save(
    path: str | Path,
    weights: LoraWeights,
    metadata: Mapping[str, object] | None = None,
    *,
    naming: str = "auto",
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes weights as one safetensors file and returns its path; a half-written file is never left.

    metadata: into the header's `diptych` JSON block: base, algorithm, reward, step, sigma_window, anything
    JSON (what `weights.info` knows is the default). naming: "diffusers", "kohya", or "auto" (kohya for a
    Stable Diffusion UNet). dtype: of the factors on disk, default as they are.
    Raises LoraError for LyCORIS factors and whole checkpoints, which this format does not hold.
    """
    from safetensors.torch import save_file

    if naming == "auto":
        naming = "kohya" if weights.info.base == "Stable Diffusion UNet" else "diffusers"
    if naming not in ("diffusers", "kohya"):
        raise ValueError(f"naming is {naming!r}: choose auto, diffusers or kohya")
    tensors: dict[str, Tensor] = {}
    for name, module in weights.modules.items():
        if isinstance(module, LowRank):
            tensors.update(_kohya(name, module) if naming == "kohya" else _diffusers(name, module))
        elif isinstance(module, MoeLowRank) and naming == "diffusers":
            tensors.update(_experts(name, module))
        else:
            raise LoraError(
                f"{name} is a {type(module).__name__}, which {naming} naming cannot hold: extract a LoRA"
            )
    if weights.full:
        raise LoraError(
            f"{len(weights.full)} whole tensors ({next(iter(weights.full))}, ...) do not fit a LoRA file: "
            "remove them, or save the whole model"
        )
    # contiguous copies: safetensors refuses views that share storage (the parts of a fused layer)
    alphas = {k for k in tensors if k.endswith(".alpha")}
    tensors = {
        k: t.detach().to("cpu", t.dtype if k in alphas or dtype is None else dtype).contiguous().clone()
        for k, t in sorted(tensors.items())
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    save_file(tensors, str(partial), metadata=header(weights, metadata, folded=naming == "diffusers"))
    sort_header(partial)
    os.replace(partial, path)
    return path


def header(
    weights: LoraWeights, metadata: Mapping[str, object] | None = None, *, folded: bool = True
) -> dict[str, str]:
    """The safetensors header: diffusers' `lora_adapter_metadata`, and our own `diptych` block."""
    info = weights.info
    ours: dict[str, object] = {
        "version": VERSION,
        **{k: getattr(info, k) for k in ("base", "alpha", "algorithm", "reward", "step", "sigma_window")},
    }
    if info.curve:
        ours["curve"] = [list(pair) for pair in info.curve]
    moe = next((m for m in weights.modules.values() if isinstance(m, MoeLowRank)), None)
    if moe is not None:
        ours.update(moe_gate=moe.gate, moe_top_k=moe.top_k, moe_experts=moe.experts)
    ours.update(metadata or {})
    ours = {k: v for k, v in ours.items() if v is not None}
    out = {"format": "pt", "diptych": json.dumps(ours)}
    ranks = {name: m.rank for name, m in weights.modules.items() if isinstance(m, LowRank)}
    if folded and ranks:
        rank = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {_anchored(name, ranks): r for name, r in ranks.items() if r != rank}
        fields = {
            "r": rank,
            "lora_alpha": rank,  # the scale is folded into the factors
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": list(ranks),
        }
        out["lora_adapter_metadata"] = json.dumps({f"transformer.{k}": v for k, v in fields.items()})
    return out


def _anchored(name: str, names: Iterable[str]) -> str:
    """The name as a peft pattern, which without `^` also means every longer name that ends in it."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def fold(module: LowRank | MoeLowRank) -> LowRank | MoeLowRank:
    """The same change at scale 1: sqrt(|scale|) goes into either factor, the sign into B.

    An even split keeps the factors' sizes balanced, which matters in float16 and bfloat16.
    """
    if module.scale == 1.0:
        return module
    root = math.sqrt(abs(module.scale))
    A, B = _times(module.A, root), _times(module.B, math.copysign(root, module.scale))
    return replace(module, A=A, B=B, scale=1.0, scale_from="folded into A and B")


def _times(tensor: Tensor, factor: float) -> Tensor:
    """The product in the tensor's own type where that loses nothing (a power of two), else in float32."""
    product = tensor.float() * factor
    narrow = product.to(tensor.dtype)
    return narrow if torch.equal(narrow.float(), product) else product


def sort_header(path: Path) -> None:
    """Puts a safetensors file's own facts in alphabetical order, in place.

    The library writes them in another order each time, and equal runs should leave equal files.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
        entries["__metadata__"] = dict(sorted(entries.get("__metadata__", {}).items()))
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # the same characters in another order: always so
            file.seek(8)
            file.write(text.ljust(length))


def _diffusers(name: str, module: LowRank) -> dict[str, Tensor]:
    folded = fold(module)
    return {f"transformer.{name}.lora_A.weight": folded.A, f"transformer.{name}.lora_B.weight": folded.B}


def _kohya(name: str, module: LowRank) -> dict[str, Tensor]:
    key = "lora_unet_" + name.replace(".", "_")
    return {
        f"{key}.lora_down.weight": module.A,
        f"{key}.lora_up.weight": module.B,
        f"{key}.alpha": torch.tensor(float(module.scale * module.rank)),
    }


def _experts(name: str, module: MoeLowRank) -> dict[str, Tensor]:
    folded = fold(module)
    out = {f"transformer.{name}.lora_route.weight": folded.router}
    for i in range(folded.experts):
        out[f"transformer.{name}.lora_A.expert_{i}.weight"] = folded.A[i]
        out[f"transformer.{name}.lora_B.expert_{i}.weight"] = folded.B[i]
    return out
