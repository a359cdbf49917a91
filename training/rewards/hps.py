"""HPSv2.1's weights as a transformers CLIPModel: open_clip names -> transformers names, key by key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPModel

# ViT-H-14 of open_clip; transformers' CLIPModel has the same architecture.
VIT_H_14 = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
        "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
}

_OUTER = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
# open_clip multiplies by these from the right, transformers' Linear from the left.
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)$")


def convert_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip ViT state dict -> transformers CLIPModel state dict.

    Raises ValueError naming the first key that has no place.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in _OUTER:
            out[_OUTER[key]] = value
        elif key in _TRANSPOSED:
            out[_TRANSPOSED[key]] = value.T.contiguous()
        elif key == "attn_mask":
            continue
        elif match := _BLOCK.match(key):
            tower = "vision_model" if match[1] else "text_model"
            layer = f"{tower}.encoder.layers.{match[2]}"
            rest = match[3]
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for part, chunk in zip("qkv", value.chunk(3), strict=True):
                    out[f"{layer}.self_attn.{part}_proj.{kind}"] = chunk.clone()
            else:
                name, _, kind = rest.rpartition(".")
                if name not in _INNER:
                    raise ValueError(f"open_clip key {key!r} is not known: is this an HPSv2 checkpoint?")
                out[f"{layer}.{_INNER[name]}.{kind}"] = value
        else:
            raise ValueError(f"open_clip key {key!r} is not known: is this an HPSv2 checkpoint?")
    return out


def load_hps_clip(path: str, config: dict | None = None) -> CLIPModel:
    """A CLIPModel from `HPS_v2.1_compressed.pt` (weights_only), or from a converted folder or hub id.

    Raises ValueError if the checkpoint does not fill the model exactly.
    """
    from transformers import CLIPConfig, CLIPModel

    if not Path(path).is_file():
        return CLIPModel.from_pretrained(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = CLIPModel(CLIPConfig(**(config or VIT_H_14)))
    missing, unexpected = model.load_state_dict(
        convert_open_clip(state.get("state_dict", state)), strict=False
    )
    missing = [key for key in missing if not key.endswith("position_ids")]
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit CLIP ViT-H-14: missing {missing[:3]}, unexpected {unexpected[:3]}."
        )
    return model
