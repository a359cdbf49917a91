"""What is trained: LoRA (peft), MoE-LoRA, or everything; added to a diffusers module and read out again.

Trained tensors are float32 whatever the base's dtype. Names in `trained_state` are the diffusers module paths
with `lora_A.weight` / `lora_B.weight` (and `lora_A.expert_0.weight`, `lora_route.weight` for MoE), without
peft's adapter name, which is how files spell them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.lora.moe import gate_weights, mixture
from .losses import load_balance

ADAPTER = "default"
TEXT_TARGETS = [r".*\.(q_proj|k_proj|v_proj|out_proj|SelfAttention\.[qkvo])"]
MOE_TARGETS = r"(transformer_blocks\.\d+\.ff\.net\.2|single_transformer_blocks\.\d+\.proj_out)"


class MoELoRALinear(nn.Module):
    """A frozen linear plus token-wise routed low-rank experts (ICEdit's MoE-LoRA).

    y = base(x) + sum_i g_i(x) (alpha/r) B_i A_i x over the top_k experts. gate `softmax_topk`: softmax over
    the kept logits (with top_k = 1 always 1: the router gets no gradient, as in the original). gate
    `softmax_all`: softmax over all logits, then the top k of it (Switch): the router learns, helped by
    `balance`, the load-balance loss of the last forward.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, experts: int, top_k: int, gate: str):
        super().__init__()
        self.base_layer = base
        self.scale, self.top_k, self.gate = alpha / rank, top_k, gate
        device = base.weight.device
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        for i in range(experts):
            self.lora_A[f"expert_{i}"] = nn.Linear(base.in_features, rank, bias=False, device=device)
            self.lora_B[f"expert_{i}"] = nn.Linear(rank, base.out_features, bias=False, device=device)
            nn.init.normal_(self.lora_A[f"expert_{i}"].weight, std=1 / rank)
            nn.init.zeros_(self.lora_B[f"expert_{i}"].weight)
        self.lora_route = nn.Linear(base.in_features, experts, bias=False, device=device)
        nn.init.normal_(self.lora_route.weight, std=base.in_features**-0.5)
        self.balance: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def gates(self, x: Tensor) -> Tensor:
        """Weights of the experts [..., E], zero for those not taken; keeps the load-balance loss."""
        logits = self.lora_route(x).float()
        gates = gate_weights(logits, self.top_k, self.gate)
        self.balance = load_balance(logits.softmax(-1), gates > 0) if self.gate == "softmax_all" else None
        # The original's gate is constant in the router; DDP needs every trained weight in the graph.
        return gates if gates.requires_grad else gates + 0 * logits

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        x = x.to(self.lora_route.weight.dtype)
        gates = self.gates(x)
        down = torch.cat([layer.weight for layer in self.lora_A.values()], dim=0)
        up = torch.cat([layer.weight for layer in self.lora_B.values()], dim=1)
        return result + mixture(F.linear(x, down), self.scale * gates, up).to(result.dtype)


def _matching(module: nn.Module, patterns: list[str]) -> list[str]:
    whole = re.compile("|".join(f"(?:{p})" for p in patterns))
    kinds = (nn.Linear, nn.Conv2d)
    return [
        name for name, child in module.named_modules() if isinstance(child, kinds) and whole.fullmatch(name)
    ]


def add_lora(module: nn.Module, patterns: list[str], config) -> list[str]:
    """Add LoRA (or MoE-LoRA) to the linears whose path fully matches a pattern; returns their paths.

    Everything else is frozen. Raises ValueError if nothing matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = _matching(module, patterns)
    if not names:
        raise ValueError(
            f"target_modules {patterns} match no linear of {type(module).__name__}: check the names"
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
    for name in moe:
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        wrapped = MoELoRALinear(
            module.get_submodule(name),
            config.rank,
            config.alpha,
            config.moe_experts,
            config.moe_top_k,
            config.moe_gate,
        )
        if isinstance(owner, nn.ModuleList):
            owner[int(leaf)] = wrapped
        else:
            setattr(owner, leaf, wrapped)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return names


@contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """The model without its LoRA inside the block."""
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
        for parameter in trained:  # peft's switch also freezes
            parameter.requires_grad_(True)


def train_all(module: nn.Module) -> None:
    """Every weight trained, in float32."""
    module.float().requires_grad_(True)


def attach(module: nn.Module, patterns: list[str], config) -> None:
    """Make a module trainable as `config.method` says: adapters on the matching linears, or everything."""
    if config.method == "full":
        train_all(module)
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


def balance_loss(module: nn.Module) -> Tensor | None:
    """Mean load-balance loss over the MoE layers of the last forward; None without any."""
    terms = [m.balance for m in module.modules() if isinstance(m, MoELoRALinear) and m.balance is not None]
    return torch.stack(terms).mean() if terms else None
