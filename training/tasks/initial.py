"""Initial weights besides a base model's: fresh ones, a sibling's, LoRAs merged or trained further."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from .adapters import ADAPTER
from .moe import MoELoRALinear

logger = logging.getLogger(__name__)

SD_WIDTHS = {"latents": 4, "mask": 1, "image": 4}
SD_INPUTS = {4: ("latents",), 8: ("latents", "image"), 9: ("latents", "mask", "image")}


def check_loras(config: Any) -> None:
    """Read the LoRAs of fuse_loras and init_lora, so that a wrong path is told before hours of caching.

    Raises ValueError where one is missing, damaged or of a kind that cannot be merged or trained further.
    Whether its layers fit shows when it is used.
    """
    from ...models.lora import read
    from ...models.lora.files import with_strength
    from ...models.lora.merge import check_mergeable

    for path, strength in map(with_strength, config.fuse_loras):
        check_mergeable(read(path), strength)
    if config.init_lora:
        _check_plain(read(config.init_lora), config.init_lora)


def fuse(module: nn.Module, path: str, strength: float = 1.0) -> None:
    """Merge a LoRA file of any format into the module's weights (bfloat16 or finer).

    Raises ValueError where a part of it does not fit, or depends on the token (MoE) and so has no weight
    change; the module is untouched then.
    """
    from ...models.lora import read
    from ...models.lora.merge import merge

    weights = read(path)
    report = merge(module, weights, strength)
    if report.skipped or weights.info.sigma_window is not None:
        logger.warning("merged %s", report)


@torch.no_grad()
def zero_modulation(transformer: nn.Module) -> None:
    """Make every block of a fresh transformer the identity (adaLN-Zero, arXiv 2212.09748, section 3.2)."""
    for name, part in transformer.named_modules():
        if isinstance(part, nn.Linear) and (".norm" in name or "norm_out" in name or name == "proj_out"):
            part.weight.zero_()
            part.bias.zero_()


def with_inputs(transformer: Any, channels: int) -> Any:
    """The transformer reading `channels` features of a token: its first ones, and new ones of weight zero."""
    have = transformer.config.in_channels
    if have == channels:
        return transformer
    state = transformer.state_dict()
    weight = state["x_embedder.weight"][:, :channels]
    state["x_embedder.weight"] = nn.functional.pad(weight, (0, channels - weight.shape[1])).contiguous()
    # out_channels is in_channels where a config leaves it empty
    config = {**transformer.config, "in_channels": channels, "out_channels": transformer.out_channels}
    fresh = type(transformer).from_config(config).to(transformer.dtype)
    fresh.load_state_dict(state)
    return fresh


@torch.no_grad()
def with_image(unet: Any, channels: int) -> Any:
    """Make a Stable Diffusion UNet of 4, 8 or 9 input channels one of `channels`; returns it.

    Channels for the same thing (`SD_INPUTS`) keep their weights, new ones get zeros: what a text-to-image
    model becomes predicts just what it did. Raises ValueError for a UNet of another width.
    """
    have = unet.config.in_channels
    if have == channels:
        return unet
    if have not in SD_INPUTS:
        raise ValueError(f"the UNet takes {have} channels: start from one of 4, 8 (glid) or 9 (inpainting)")
    old = unet.conv_in
    widths = [SD_WIDTHS[part] for part in SD_INPUTS[have]]
    known = dict(zip(SD_INPUTS[have], old.weight.split(widths, dim=1), strict=True))
    blank = old.weight.new_zeros(old.out_channels, 1, *old.kernel_size)
    parts = [known.get(part, blank.expand(-1, SD_WIDTHS[part], -1, -1)) for part in SD_INPUTS[channels]]
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    new.weight, new.bias = nn.Parameter(torch.cat(parts, dim=1)), old.bias
    unet.conv_in = new
    unet.register_to_config(in_channels=channels)
    logger.info("the UNet's input of %d channels became one of %d", have, channels)
    return unet


@torch.no_grad()
def from_lora(module: nn.Module, path: str, config: Any) -> None:
    """Give new adapters the weights of a plain LoRA file, its leading singular directions where it has more.

    Experts of a MoE-LoRA all get their module's LoRA, slightly apart; twice as strong with the trained gate,
    which over several alike experts gives its first about one half. Raises ValueError where a part of
    the file would be lost: it fits no adapter, or is no plain LoRA.
    """
    from ...models.lora import read
    from ...models.lora.fit import fit_module

    layers, scale, weights = dict(module.named_modules()), config.alpha / config.rank, read(path)
    fitted = {}
    for name, change in _plain(weights, path, layers).items():
        base = layers[name].base_layer.weight
        fitted[name] = fit_module(name, change, *base.shape[:2], [], kernel=tuple(base.shape[2:]))
    for name, change in fitted.items():
        _fill(layers[name], change, scale, config.rank)


def _plain(weights: Any, path: str, layers: dict[str, nn.Module]) -> dict[str, Any]:
    """The LoRA's modules, if all of it is plain pairs for adapters that are there."""
    has = {name for name, layer in layers.items() if hasattr(layer, "lora_A")}
    if not has & set(weights.modules):
        raise ValueError(f"init_lora {path} fits none of target_modules: give a plain LoRA of this model")
    _check_plain(weights, path)
    lost = [n for n in weights.modules if n not in has]
    if lost:
        raise ValueError(
            f"init_lora {path} changes {len(lost)} layers that are not trained ({lost[0]}): add them to "
            "target_modules, or merge it with fuse_loras instead"
        )
    return dict(weights.modules)


def _check_plain(weights: Any, path: str) -> None:
    """Raise ValueError unless all of the LoRA is plain pairs A, B."""
    from ...models.lora import LowRank

    odd = [n for n, change in weights.modules.items() if not isinstance(change, LowRank)] + list(weights.full)
    if odd:
        raise ValueError(
            f"init_lora {path} has more than plain LoRA factors ({odd[0]}): merge it with fuse_loras instead"
        )


def _fill(layer: nn.Module, change: Any, scale: float, rank: int) -> None:
    """Write a LowRank change into a new adapter of this scale and rank."""
    from ...models.lora.resize import cut

    down, up = change.A.float().flatten(1), change.B.float().flatten(1) * (change.scale / scale)
    down, up = cut(down, up, rank)
    if isinstance(layer, MoELoRALinear):
        strength = 2.0 if layer.gate == "softmax_all" else 1.0
        for expert in layer.lora_A:
            layer.lora_A[expert].weight[: len(down)] = down + 0.1 * down.std() * torch.randn_like(down)
            layer.lora_B[expert].weight[:, : len(down)] = strength * up
    else:
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        A[: len(down)] = down.reshape(-1, *A.shape[1:])
        B[:, : len(down)] = up.reshape(len(up), -1, *B.shape[2:])
