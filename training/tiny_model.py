"""The tiny FLUX transformer as it is trained on a CPU: attention written out, text padded by arithmetic.

Same numbers as diffusers' own forward (tests/unit/test_tiny_models.py); only the time differs. And what a
training starts from: fresh weights, a base, a base with a LoRA merged, a LoRA cut down to another's rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..models.packing import image_ids, pack_latents, pack_mask, unpack_latents
from ..models.tiny import build
from . import adapters

TEXT_MODULES = [
    r"context_embedder",
    r"transformer_blocks\.\d+\.(norm1_context\.linear|attn\.(add_[qkv]_proj|to_add_out)|ff_context\.net\.2)",
]


class ExplicitAttention:
    """FLUX attention written out: on a CPU several times faster backward than `scaled_dot_product_attention`.

    Rotary embedding is applied to the picture's tokens only, since text ids are zero, as a product with the
    constant that maps (a, b) to (-b, a). Same numbers as diffusers' processor.
    """

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        size = attn.head_dim
        joint = encoder_hidden_states is not None
        text = encoder_hidden_states.shape[1] if joint else attention_mask.text_tokens
        query, key, value = (_heads(f(hidden_states), size) for f in (attn.to_q, attn.to_k, attn.to_v))
        query, key = _rms(query, attn.norm_q.weight), _rms(key, attn.norm_k.weight)
        cos, sin = (t[text:].to(query.dtype) for t in image_rotary_emb)
        if joint:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            words = [_heads(f(encoder_hidden_states), size) for f in projections]
            text_query, text_key = (
                _rms(words[0], attn.norm_added_q.weight),
                _rms(words[1], attn.norm_added_k.weight),
            )
            value = torch.cat([words[2], value], 2)
        else:
            text_query, query = query[:, :, :text], query[:, :, text:]
            text_key, key = key[:, :, :text], key[:, :, text:]
        turn = _turn(size).to(query.dtype)
        query = torch.cat([text_query, query * cos + (query @ turn) * sin], 2)
        key = torch.cat([text_key, key * cos + (key @ turn) * sin], 2)
        logits = (query * size**-0.5) @ key.transpose(-1, -2) + attention_mask.bias
        out = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        if joint:
            return attn.to_out[0](out[:, text:]), attn.to_add_out(out[:, :text])
        return out


@dataclass
class TextBias:
    """Attention bias `[B,1,1,S]` and how many of the S tokens are text."""

    bias: Tensor
    text_tokens: int


def _heads(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


class _RMSNorm(torch.autograd.Function):
    """Root-mean-square norm with the mean as a matrix product: on CPUs the library's broadcasts are slow."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
        inverse = ((x * x) @ mean).add_(1e-6).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight, mean)
        return normed * weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normed, inverse, weight, mean = ctx.saved_tensors
        inner = gradient * weight
        along = (normed * inner) @ mean
        x = (inner - normed * along).mul_(inverse)
        weights = (normed * gradient).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return x, weights, None


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    size = x.shape[-1]
    return _RMSNorm.apply(x, weight.to(x.dtype), torch.full((size, size), 1 / size, dtype=x.dtype))


@lru_cache(maxsize=4)
def _turn(size: int) -> Tensor:
    even = torch.arange(0, size, 2)
    turn = torch.zeros(size, size)
    turn[even + 1, even], turn[even, even + 1] = -1.0, 1.0
    return turn


class Velocity:
    """The transformer as `velocity(x, sigma, ...)` on spatial latents, for either family's rows."""

    def __init__(self, transformer: nn.Module, family: str, bf16: bool = True):
        self.transformer, self.family, self.bf16 = transformer, family, bf16
        transformer.set_attn_processor(ExplicitAttention())

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        rows: dict[str, Tensor],
        text: tuple[Tensor, Tensor, Tensor],
        guidance: Tensor,
    ) -> Tensor:
        tokens, pooled, bias = text
        height, width = x.shape[-2:]
        target = pack_latents(x)
        ids = image_ids(height, width)
        condition = pack_latents(rows["condition"])
        if self.family == "kontext":
            packed = torch.cat([target, condition], 1)
            ids = torch.cat([ids, image_ids(height, width, 1)])
        else:
            packed = torch.cat([target, condition, pack_mask(rows["mask"])], -1)
        mask = torch.cat([bias, torch.zeros(len(x), packed.shape[1])], 1)[:, None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            out = self.transformer(
                hidden_states=packed,
                timestep=sigma,
                guidance=guidance,
                pooled_projections=pooled,
                encoder_hidden_states=tokens,
                txt_ids=torch.zeros(tokens.shape[1], 3),
                img_ids=ids,
                joint_attention_kwargs={
                    "attention_mask": TextBias(mask.bfloat16() if self.bf16 else mask, tokens.shape[1])
                },
                return_dict=False,
            )[0]
        return unpack_latents(out[:, : target.shape[1]].float(), height, width)


def transformer_for(recipe: Any) -> nn.Module:
    """The module to train: fresh with zero-initialised modulation, or loaded; with adapters for a LoRA."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(recipe.seed)
    channels = 64 if recipe.family == "kontext" else 384
    if recipe.start_from:
        module = FluxTransformer2DModel.from_pretrained(recipe.start_from).float()
        if recipe.merge_lora:
            adapters.fuse(module, recipe.merge_lora)
        if module.config.in_channels != channels:
            module = _with_inputs(module, channels)
    else:
        module = build.flux_transformer(channels)
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear) and (".norm" in name or "norm_out" in name or name == "proj_out"):
                nn.init.zeros_(part.weight)
                nn.init.zeros_(part.bias)
    if recipe.method != "full":
        more = TEXT_MODULES if recipe.text_modules else []
        adapters.add_lora(module, adapters.TARGETS["fill"] + more, recipe)
        if recipe.start_lora:
            _start_adapters(module, _plain_lora(recipe.start_lora), recipe.rank)
    return module


def _plain_lora(path: str) -> dict[str, Tensor]:
    """Tensors of a plain LoRA under peft's names, from a `state.pt` or a LoRA file."""
    if path.endswith(".pt"):
        return torch.load(path, weights_only=True)["ema"]
    from ..models.lora import read

    tensors = {}
    for name, part in read(path).modules.items():
        tensors[f"{name}.lora_A.default.weight"] = part.A.float()
        tensors[f"{name}.lora_B.default.weight"] = part.scale * part.B.float()
    return tensors


@torch.no_grad()
def _start_adapters(module: nn.Module, state: dict[str, Tensor], rank: int) -> None:
    """Fills adapters from a plain LoRA's tensors, cut to `rank` by SVD where they had more.

    Experts all start from their module's LoRA, slightly apart, and twice as strong, since a gate over four
    experts gives its first about one half.
    """
    layers = dict(module.named_modules())
    for key in [k for k in state if k.endswith("lora_A.default.weight")]:
        name = key.removesuffix(".lora_A.default.weight")
        u, s, v = torch.linalg.svd(state[f"{name}.lora_B.default.weight"] @ state[key], full_matrices=False)
        root = s[:rank].sqrt()
        down, up = root[:, None] * v[:rank], u[:, :rank] * root
        layer = layers[name]
        if isinstance(layer, adapters.MoELoRALinear):
            for expert in layer.lora_A:
                noise = 0.1 * down.std() * torch.randn_like(down)
                layer.lora_A[expert].weight.copy_(down + noise)
                layer.lora_B[expert].weight.copy_(2 * up)
        elif f"{name}.lora_A.default" in layers:
            layers[f"{name}.lora_A.default"].weight.copy_(down)
            layers[f"{name}.lora_B.default"].weight.copy_(up)


def _with_inputs(module: nn.Module, channels: int) -> nn.Module:
    """The same transformer reading only the first `channels` features of a token."""
    fresh = build.flux_transformer(channels)
    state = module.state_dict()
    state["x_embedder.weight"] = state["x_embedder.weight"][:, :channels].clone()
    fresh.load_state_dict(state)
    return fresh
