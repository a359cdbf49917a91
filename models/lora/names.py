"""Where a layer's name in a file leads: any naming in use -> diffusers module path(s).

Namings: diffusers dotted, BFL dotted (ComfyUI, fal, BFL control), both with underscores (kohya, LyCORIS,
OneTrainer), XLabs processors, Stable Diffusion UNets in diffusers naming. Only names; no tensors here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

_PREFIXES = (
    "base_model.model.",
    "module.",
    "_orig_mod.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
)
_WRAPPERS = re.compile("(?:" + "|".join(map(re.escape, _PREFIXES)) + ")*")
_FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_", "oft_unet_")
_TEXT_PREFIXES = ("lora_te", "text_encoder", "text_model.", "lora_prior_te", "te1.", "te2.", "conditioner.")
_TEXT_PREFIXES += ("clip_l.", "clip_g.", "t5xxl.", "cond_stage_model.")

# Every dotted segment that itself may contain an underscore or stand in an underscored name.
_SEGMENTS = """
double_blocks single_blocks img_attn txt_attn img_mlp txt_mlp img_mod txt_mod qkv proj lin linear linear1
linear2 modulation img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer
adaLN_modulation transformer_blocks single_transformer_blocks attn attn1 attn2 to_q to_k to_v to_out
to_add_out add_q_proj add_k_proj add_v_proj ff ff_context net norm norm1 norm1_context norm2 norm2_context
norm3 norm_q norm_k norm_added_q norm_added_k norm_out proj_mlp proj_out proj_in x_embedder context_embedder
time_text_embed timestep_embedder text_embedder guidance_embedder linear_1 linear_2 down_blocks up_blocks
mid_block attentions resnets downsamplers upsamplers conv conv1 conv2 conv_in conv_out conv_shortcut
time_emb_proj time_embedding add_embedding conv_norm_out
""".split()
_FLAT = re.compile("(" + "|".join(sorted(_SEGMENTS, key=len, reverse=True)) + r"|\d+)(?:_|$)")

_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear1_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
}
_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_EMBEDDERS = {
    "time_in": "timestep_embedder",
    "vector_in": "text_embedder",
    "guidance_in": "guidance_embedder",
}
_LAYERS = {"in_layer": "linear_1", "out_layer": "linear_2"}
_XLABS = {
    "processor.qkv_lora1": "img_attn.qkv",
    "processor.qkv_lora2": "txt_attn.qkv",
    "processor.proj_lora1": "img_attn.proj",
    "processor.proj_lora2": "txt_attn.proj",
    "processor.qkv": "linear1_qkv",
    "processor.proj": "linear2",
}


class Target(NamedTuple):
    """One diffusers module; part = (i, n) when it is the i-th of n row blocks of the file's fused layer.

    swap: the two row halves change places (BFL's final layer has shift, scale; diffusers scale, shift).
    """

    path: str
    part: tuple[int, int] | None = None
    swap: bool = False


def strip(key: str) -> tuple[str, bool]:
    """Removes wrappers' prefixes from a key; True when the rest is in underscored naming."""
    key = key[_WRAPPERS.match(key).end() :]
    for prefix in _FLAT_PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :], True
    return key, False


def is_text_encoder(key: str) -> bool:
    """Whether a key belongs to a text encoder, which the pack does not change."""
    key = key.removeprefix("base_model.model.")
    return key.startswith(_TEXT_PREFIXES)


def unflatten(name: str) -> str | None:
    """`double_blocks_0_img_attn_qkv` -> `double_blocks.0.img_attn.qkv`; None if a word is unknown."""
    words, at = [], 0
    while at < len(name):
        match = _FLAT.match(name, at)
        if match is None:
            return None
        words.append(match[1])
        at = match.end()
    return ".".join(words)


@lru_cache(maxsize=8192)
def targets(name: str, flat: bool = False) -> tuple[Target, ...]:
    """The diffusers modules that a layer name (already stripped of prefixes) stands for; () if unknown."""
    if flat and "." not in name:
        dotted = unflatten(name)
        if dotted is None:
            return ()
        name = dotted
    head, _, rest = name.partition(".")
    if head in ("double_blocks", "single_blocks"):
        return _block_targets(head, rest)
    if name in _TOP:
        return (Target(_TOP[name], swap="adaLN" in name),)
    if head in _EMBEDDERS and rest in _LAYERS:
        return (Target(f"time_text_embed.{_EMBEDDERS[head]}.{_LAYERS[rest]}"),)
    # Stable Diffusion before peft: `attn1.processor.to_q_lora`, whose to_out is the Linear in a list.
    if ".processor." in name:
        name = name.replace(".processor.", ".")
        name = name + ".0" if name.endswith(".to_out") else name
    return (Target(name),)


def _block_targets(kind: str, rest: str) -> tuple[Target, ...]:
    number, _, layer = rest.partition(".")
    prefix = f"{'transformer_blocks' if kind == 'double_blocks' else 'single_transformer_blocks'}.{number}."
    layer = _XLABS.get(layer, layer)
    if layer in _FUSED:
        names = _FUSED[layer]
        return tuple(Target(prefix + n, (i, len(names))) for i, n in enumerate(names))
    table = _DOUBLE if kind == "double_blocks" else _SINGLE
    return (Target(prefix + table[layer]),) if layer in table else ()


def part_rows(part: tuple[int, int], rows: int, width: int | None) -> tuple[int, int]:
    """The rows [start, stop) of a fused layer that belong to its i-th part.

    qkv has three equal parts; linear1 has q, k, v of `width` rows each and the mlp's rows after them
    (width = the layer's input size; 7 = 3 + mlp ratio 4 when it is not known, as for a bias).
    """
    i, n = part
    if n == 3:
        return i * rows // 3, (i + 1) * rows // 3
    width = rows // 7 if width is None else width
    return i * width, (i + 1) * width if i < 3 else rows
