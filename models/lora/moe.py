"""The mixture-of-experts LoRA of ICEdit as one function of tensors: two matrix products, exact routing.

Differentiable, for training and inference alike. Not for deciding where in a model it runs (`delta.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = ("softmax_topk", "softmax_all")


def gate_weights(logits: Tensor, top_k: int = 1, gate: str = "softmax_topk") -> Tensor:
    """[..., experts] router logits -> the weight of each expert, zero for those not kept, in float32.

    softmax_topk: softmax over the k kept logits (ICEdit `moe_forward`, where k = 1 gives exactly 1 and the
    router no gradient); softmax_all: softmax over all logits, the k largest kept as they are (Switch). Raises
    ValueError for another gate.
    """
    if gate not in GATES:
        raise ValueError(f"gate is {gate!r}: choose one of {', '.join(GATES)}")
    if gate == "softmax_topk" and top_k == 1:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    kept, index = logits.topk(top_k, dim=-1)
    weights = kept.softmax(-1, dtype=torch.float32)
    if gate == "softmax_all":
        weights = logits.softmax(-1, dtype=torch.float32).gather(-1, index)
    return torch.zeros(logits.shape, dtype=torch.float32, device=logits.device).scatter(-1, index, weights)


def stack(A: Tensor, B: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """Experts side by side: down [n, in] holds all A, the router, zero rows; up [out, experts*rank] all B.

    n is a multiple of 32: matrix units of CPUs and GPUs take odd sizes a third slower.
    """
    # the router decides: it is not rounded to the experts' type
    dtype = torch.promote_types(*(torch.bfloat16 if t.dtype.itemsize < 2 else t.dtype for t in (A, router)))
    down = torch.cat([A.flatten(0, 1).to(dtype), router.to(dtype)])
    down = F.pad(down, (0, 0, 0, -down.shape[0] % 32))
    return down, B.permute(1, 0, 2).flatten(1).contiguous()


def mixture(activation: Tensor, weights: Tensor, up: Tensor, base: Tensor | None = None) -> Tensor:
    """`sum_i w_i B_i a_i` (+ base) [..., out] of the activations a = A x of all experts, in one product.

    activation: [..., experts*rank]; weights: [..., experts], zero for experts not taken; up: from `stack`.
    base is written into where no gradient needs it.
    """
    # cast after spreading: the router's gradient is a sum over the rank, in float32
    weights = weights.repeat_interleave(up.shape[1] // weights.shape[-1], dim=-1)
    gated = activation * weights.to(activation.dtype)
    if base is None:
        return F.linear(gated, up)
    rows = gated.flatten(0, -2)
    if base.is_contiguous() and not (torch.is_grad_enabled() and (base.requires_grad or rows.requires_grad)):
        base.view(-1, base.shape[-1]).addmm_(rows, up.t())
        return base
    return torch.addmm(base.flatten(0, -2), rows, up.t()).view(base.shape)


def moe_delta(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    experts: int,
    *,
    scale: float = 1.0,
    top_k: int = 1,
    gate: str = "softmax_topk",
    base: Tensor | None = None,
) -> Tensor:
    """`sum_i g_i(x) * scale * B_i A_i x` (+ base) for tokens x [..., in] -> [..., out].

    down, up: from `stack`. One product gives every expert's activation and the router's logits; the gate
    zeroes those of the experts not chosen; the second product adds the rest up. base is written into where
    no gradient needs it.
    Source: River-Zhang/ICEdit, peft/tuners/lora/layer.py `moe_forward`, which loops over the experts.
    """
    hidden, width = F.linear(x, down), up.shape[1]
    activation, logits = hidden[..., :width], hidden[..., width : width + experts]
    return mixture(activation, gate_weights(logits, top_k, gate) * scale, up, base)
