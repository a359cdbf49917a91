"""The layer that MoE-LoRA trains, and the loss that keeps its experts in use.

What it computes is `models/lora/moe.py`'s, which loaders run; the router has a product of its own here, since
its gradient and its losses are wanted in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.lora.moe import gate_weights, mixture


class MoELoRALinear(nn.Module):
    """A frozen linear plus token-wise routed low-rank experts (ICEdit's MoE-LoRA).

    y = base(x) + sum_i g_i(x) (alpha/r) B_i A_i x over the top_k experts. gate `softmax_topk`: softmax over
    the kept logits (with top_k = 1 always 1: the router gets no gradient, as in the original). gate
    `softmax_all`: softmax over all logits, then the top k of it (Switch): the router learns, helped by
    `balance`, the load-balance loss of the last forward.
    """

    def __init__(self, base: nn.Linear, config):
        """config: rank, alpha, moe_experts, moe_top_k and moe_gate of a recipe."""
        super().__init__()
        self.base_layer = base
        self.scale, self.top_k, self.gate = config.alpha / config.rank, config.moe_top_k, config.moe_gate
        rank, experts, device = config.rank, config.moe_experts, base.weight.device
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
        """The frozen linear's, for code that looks at a layer's dtype or shape."""
        return self.base_layer.weight

    def gates(self, x: Tensor) -> Tensor:
        """Weights of the experts [..., E], zero for those not taken; keeps the load-balance loss."""
        logits = self.lora_route(x).float()
        gates = gate_weights(logits, self.top_k, self.gate)
        self.balance = load_balance(logits.softmax(-1), gates > 0) if self.gate == "softmax_all" else None
        # The original's gate is constant in the router; DDP needs every trained weight in the graph.
        return gates if gates.requires_grad else gates + 0 * logits

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] in the base's dtype."""
        result = self.base_layer(x)
        x = x.to(self.lora_route.weight.dtype)
        gates = self.gates(x)
        down = torch.cat([layer.weight for layer in self.lora_A.values()], dim=0)
        up = torch.cat([layer.weight for layer in self.lora_B.values()], dim=1)
        return result + mixture(F.linear(x, down), self.scale * gates, up).to(result.dtype)


def load_balance(gates: Tensor, chosen: Tensor) -> Tensor:
    """Switch-Transformer load-balance loss E * sum_e f_e P_e (arXiv 2101.03961, eq. 4); 1 when all even.

    gates: softmax probabilities over all experts [..., E]; chosen: 0/1 [..., E] of the experts taken.
    """
    experts = gates.shape[-1]
    share = chosen.float().flatten(0, -2).mean(0)
    share = share / share.sum().clamp_min(1e-9)
    return experts * (share * gates.float().flatten(0, -2).mean(0)).sum()


def balance_loss(module: nn.Module) -> Tensor | None:
    """Mean load-balance loss over the MoE layers of the last forward; None without any."""
    terms = [m.balance for m in module.modules() if isinstance(m, MoELoRALinear) and m.balance is not None]
    return torch.stack(terms).mean() if terms else None
