"""What a LoRA file is, in people's words: who wrote it, and for which model family. For reports only."""

from __future__ import annotations

from collections.abc import Mapping

from .files import RawFile
from .weights import FullTensor, Module

UNET = "Stable Diffusion UNet"
_KINDS = {
    "lokr": "LyCORIS LoKr",
    "loha": "LyCORIS LoHa",
    "glora": "GLoRA",
    "boft": "BOFT",
    "oft": "OFT",
    "peft boft": "PEFT BOFT",
    "peft oft": "PEFT OFT",
    "dora": "DoRA",
}


def format_name(raw: RawFile, styles: set[str]) -> str:
    """Who writes such files; styles are the namings met while its keys were sorted."""
    first = next(iter(raw.tensors), "")
    if "full checkpoint" in styles:
        return "full checkpoint"
    if "moe" in styles:
        return "ICEdit MoE-LoRA"
    if "xlabs" in styles:
        return "XLabs"
    for style, name in _KINDS.items():
        if style in styles:
            return name
    if any(key.endswith("query_norm.scale") for key in raw.tensors):
        return "BFL control"
    if "kohya" in styles or "underscored" in styles:
        return "kohya" if "kohya" in styles else "OneTrainer"
    if "lora_config.json" in raw.sidecars:
        return "DanceGRPO"
    if "adapter_config.json" in raw.sidecars or first.startswith("base_model."):
        return "PEFT, BFL names" if "bfl" in styles else "PEFT"
    if "diptych" in raw.header:
        return "Diptych"
    if "bfl" in styles:
        return "BFL names"
    return "diffusers" if first.startswith(("transformer.", "unet.")) else "bare keys"


def guess_base(modules: Mapping[str, Module], full: Mapping[str, FullTensor]) -> str:
    """The model family a LoRA was trained on, from layer names and sizes."""
    paths = [*modules, *full]
    if any(p.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for p in paths):
        return UNET
    widths = {m.shape[1] for p, m in modules.items() if p.endswith((".to_q", ".to_k", "norm1.linear"))}
    is_flux = any(p.startswith("single_transformer_blocks.") for p in paths) or 3072 in widths
    if not is_flux:
        return (
            "SD3"
            if any(p.startswith("transformer_blocks.") for p in paths) and widths & {1536, 2432}
            else "unknown"
        )
    inputs = modules["x_embedder"].shape[1] if "x_embedder" in modules else None
    return {384: "FLUX Fill", 128: "FLUX control", 64: "FLUX dev or Kontext"}.get(inputs, "FLUX")
