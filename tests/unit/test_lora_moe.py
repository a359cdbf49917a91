"""ICEdit's mixture of LoRA experts: two matrix products give exactly what its loop over the experts gives."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_diptych.models.lora import MoeLowRank, read, save
from comfyui_diptych.models.lora.delta import check_window, delta_for, in_window
from comfyui_diptych.models.lora.moe import gate_weights, moe_delta, stack
from safetensors.torch import save_file
from torch import nn

EXPERTS, RANK, IN, OUT = 4, 3, 24, 10
LAYER = "transformer_blocks.0.ff.net.2"


def parts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(EXPERTS, RANK, IN, generator=generator)
    B = torch.randn(EXPERTS, OUT, RANK, generator=generator)
    return A, B, torch.randn(EXPERTS, IN, generator=generator)


def loop(x, A, B, router, scale, top_k, gate):
    """ICEdit's `moe_forward` token by token and expert by expert, in float64."""
    x, A, B, router = (t.double() for t in (x, A, B, router))
    out = torch.zeros(*x.shape[:-1], OUT, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])):
        token = x[tuple(index)]
        logits = router @ token
        kept = sorted(range(EXPERTS), key=lambda e: -float(logits[e]))[:top_k]
        over = logits[kept] if gate == "softmax_topk" else logits
        for expert in kept:
            g = logits[expert].exp() / over.exp().sum()
            out[tuple(index)] += g * scale * (B[expert] @ (A[expert] @ token))
    return out.float()


@pytest.mark.parametrize("gate", ["softmax_topk", "softmax_all"])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_equals_the_loop_over_experts(gate, top_k):
    A, B, router = parts()
    x = torch.randn(2, 7, IN, generator=torch.Generator().manual_seed(9))
    got = moe_delta(x, *stack(A, B, router), EXPERTS, scale=0.7, top_k=top_k, gate=gate)
    assert (got - loop(x, A, B, router, 0.7, top_k, gate)).abs().max() < 1e-5


def test_takes_two_matrix_products(monkeypatch):
    products = []
    for module, name in (
        (nn.functional, "linear"),
        (torch, "addmm"),
        (torch.Tensor, "addmm_"),
        (torch, "matmul"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _real=real, _name=name, **k: products.append(_name) or _real(*a, **k)
        )
    A, B, router = parts()
    delta = delta_for(MoeLowRank(A, B, router))
    delta(torch.randn(2, 5, IN), torch.randn(2, 5, OUT), nn.Identity())
    assert len(products) == 2


def test_top_1_of_softmax_topk_is_exactly_one_and_gives_the_router_no_gradient():
    router = torch.randn(EXPERTS, IN, requires_grad=True)
    logits = torch.randn(6, IN) @ router.T
    assert set(gate_weights(logits, 1, "softmax_topk").unique().tolist()) == {0.0, 1.0}
    assert not gate_weights(logits, 1, "softmax_topk").requires_grad


def test_softmax_all_gives_the_router_a_gradient():
    router = torch.randn(EXPERTS, IN, requires_grad=True)
    gate_weights(torch.randn(6, IN) @ router.T, 1, "softmax_all").square().sum().backward()
    assert router.grad.abs().max() > 0


def test_the_delta_adds_to_the_layers_own_output():
    A, B, router = parts()
    x, y = torch.randn(2, 5, IN), torch.randn(2, 5, OUT)
    delta = delta_for(MoeLowRank(A, B, router, scale=2.0))
    delta.strength = 0.5
    want = y + loop(x, A, B, router, 1.0, 1, "softmax_topk")
    assert (delta(x, y, nn.Identity()) - want).abs().max() < 3e-5


def icedit_file(folder, header=None):
    A, B, router = parts()
    name = f"transformer.{LAYER}"
    tensors = {f"{name}.lora_A.expert_{i}.weight": A[i].clone() for i in range(EXPERTS)}
    tensors |= {f"{name}.lora_B.expert_{i}.weight": B[i].clone() for i in range(EXPERTS)}
    tensors |= {f"{name}.lora_route.weight": router}
    plain = "transformer.transformer_blocks.0.attn.to_q"
    tensors |= {
        f"{plain}.lora_A.weight": torch.ones(RANK, OUT),
        f"{plain}.lora_B.weight": torch.ones(OUT, RANK),
    }
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata=header)
    return folder


def test_icedit_file_reads_as_experts_beside_plain_modules(tmp_path):
    weights = read(icedit_file(tmp_path))
    A, B, router = parts()
    moe = weights.modules[LAYER]
    assert weights.is_moe and len(weights.modules) == 2 and not weights.skipped
    assert torch.equal(moe.A, A) and torch.equal(moe.B, B) and torch.equal(moe.router, router)
    assert (moe.gate, moe.top_k, moe.scale) == ("softmax_topk", 1, 1.0)


def test_gate_and_top_k_come_from_our_header_and_the_argument_wins(tmp_path):
    icedit_file(tmp_path, {"diptych": json.dumps({"moe_gate": "softmax_all", "moe_top_k": 2})})
    moe = read(tmp_path).modules[LAYER]
    assert (moe.gate, moe.top_k) == ("softmax_all", 2)
    assert read(tmp_path, top_k=3).modules[LAYER].top_k == 3


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_experts_survive_saving_and_reading(tmp_path, scale):
    first = read(icedit_file(tmp_path), scale=scale, top_k=2)
    again = read(save(tmp_path / "ours.safetensors", first, {"moe_gate": "softmax_all"}))
    A, B, router = parts()
    moe = again.modules[LAYER]
    x = torch.randn(1, 4, IN)
    got = moe_delta(
        x, *stack(moe.A, moe.B, moe.router), EXPERTS, scale=moe.scale, top_k=moe.top_k, gate=moe.gate
    )
    assert moe.scale == 1.0
    assert (got - loop(x, A, B, router, scale, 2, "softmax_all")).abs().max() < 1e-4


def test_the_window_holds_its_start_and_not_its_end():
    assert [in_window(s, (0.8, 0.3)) for s in (1.0, 0.8, 0.5, 0.3, 0.0)] == [False, True, True, False, False]
    assert in_window(0.0, None)


@pytest.mark.parametrize("end", [0.4, 0.3, 0.1])
def test_the_windows_ends_are_those_of_a_float32_schedule(end):
    assert not in_window(float(torch.tensor(end)), (0.9, end)) and in_window(
        float(torch.tensor(0.9)), (0.9, end)
    )


def test_the_whole_range_is_no_window():
    assert check_window((1.0, 0.0)) is None and check_window(None) is None


@pytest.mark.parametrize("window", [(0.3, 0.8), (0.5, 0.5), (1.5, 0.2), (0.5, -0.1)])
def test_an_impossible_window_is_refused(window):
    with pytest.raises(ValueError, match="choose 1 >= start > end >= 0"):
        check_window(window)
