"""What is trained: LoRA (peft), MoE-LoRA, or everything; added to a diffusers module and read out again.

Trained tensors are float32 whatever the base's dtype. Names in `trained_state` are the diffusers module paths
with `lora_A.weight` / `lora_B.weight` (and `lora_A.expert_0.weight`, `lora_route.weight` for MoE), without
peft's adapter name, which is how files spell them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .moe import MoELoRALinear

ADAPTER = "default"
TEXT_TARGETS = [r".*\.(q_proj|k_proj|v_proj|out_proj|SelfAttention\.[qkvo])"]
MOE_TARGETS = r"(transformer_blocks\.\d+\.ff\.net\.2|single_transformer_blocks\.\d+\.proj_out)"


def _matching(module: nn.Module, patterns: Iterable[str]) -> list[str]:
    whole = re.compile("|".join(f"(?:{p})" for p in patterns))
    kinds = (nn.Linear, nn.Conv2d)
    return [
        name for name, child in module.named_modules() if isinstance(child, kinds) and whole.fullmatch(name)
    ]


def add_lora(module: nn.Module, patterns: Iterable[str], config) -> list[str]:
    """Add LoRA (or MoE-LoRA) to the linears whose path fully matches a pattern; returns their paths.

    Everything else is frozen. Raises ValueError if nothing matches, or nothing that could have experts.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = _matching(module, patterns)
    if not names:
        raise ValueError(
            f"target_modules {list(patterns)} match no linear of {type(module).__name__}: check the names"
        )
    moe = [n for n in names if config.method == "moe_lora" and re.fullmatch(MOE_TARGETS, n)]
    if config.method == "moe_lora" and not moe:
        raise ValueError("method is moe_lora but no ff.net.2 or single proj_out is among target_modules")
    module.requires_grad_(False)
    plain = [n for n in names if n not in moe]
    if plain:
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            init_lora_weights="gaussian",
            target_modules="|".join(re.escape(n) for n in plain),
        )
        inject_adapter_in_model(lora, module, adapter_name=ADAPTER)
    for name in moe:  # torch 2.4 has no set_submodule
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, MoELoRALinear(module.get_submodule(name), config))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return names


@contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """The module without its peft LoRA inside the block.

    peft's and diffusers' own switches are for models that they wrapped or loaded, and freeze the LoRA.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in trained:
            parameter.requires_grad_(True)


def attach(module: nn.Module, patterns: Iterable[str], config) -> None:
    """Make a module trainable as `config.method` says: adapters on the matching linears, or everything."""
    if config.method == "full":
        module.float().requires_grad_(True)
    else:
        add_lora(module, patterns, config)
    module.train()


def named(parts: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """{part/file name: parameter} of what is trained in several modules."""
    return {
        f"{part}/{name}": parameter
        for part, module in parts.items()
        for name, parameter in trained_parameters(module).items()
    }


def file_name(name: str) -> str:
    """A parameter's name as files spell it: without peft's adapter name and wrappers' prefixes."""
    for prefix in ("module.", "_orig_mod.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name.replace(f".{ADAPTER}.", ".")


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """{file name: parameter} of what is trained, in the module's order."""
    return {file_name(name): p for name, p in module.named_parameters() if p.requires_grad}


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Float32 CPU copies of the trained tensors under their file names."""
    return {name: p.detach().float().cpu().clone() for name, p in trained_parameters(module).items()}
