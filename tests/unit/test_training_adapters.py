"""What is trained: ICEdit's 343 modules, the MoE layer against a dense loop, its router's gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_diptych.training.runtime import optim
from comfyui_diptych.training.tasks import adapters
from comfyui_diptych.training.tasks.fill import FillTask
from comfyui_diptych.training.tasks.moe import MoELoRALinear
from torch import nn


def moe(gate="softmax_all", top_k=1, experts=4, width=6, out=5, rank=3, alpha=6.0):
    torch.manual_seed(0)
    config = SimpleNamespace(rank=rank, alpha=alpha, moe_experts=experts, moe_top_k=top_k, moe_gate=gate)
    layer = MoELoRALinear(nn.Linear(width, out), config)
    for up in layer.lora_B.values():
        nn.init.normal_(up.weight)
    return layer


@pytest.mark.parametrize("gate", ["softmax_all", "softmax_topk"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_moe_layer_equals_the_dense_loop(gate, top_k):
    layer, x = moe(gate, top_k), torch.randn(2, 7, 6)
    logits = x @ layer.lora_route.weight.T
    expected = layer.base_layer(x)
    for b in range(2):
        for t in range(7):
            chosen = logits[b, t].topk(top_k).indices
            share = logits[b, t].softmax(-1) if gate == "softmax_all" else torch.zeros(4)
            if gate == "softmax_topk":
                share[chosen] = logits[b, t][chosen].softmax(-1)
            for i in chosen.tolist():
                down, up = layer.lora_A[f"expert_{i}"].weight, layer.lora_B[f"expert_{i}"].weight
                expected[b, t] += share[i] * (6.0 / 3) * (up @ (down @ x[b, t]))
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize(("gate", "learns"), [("softmax_topk", False), ("softmax_all", True)])
def test_only_the_gate_over_all_logits_teaches_the_router(gate, learns):
    layer = moe(gate)
    layer(torch.randn(2, 7, 6)).square().sum().backward()
    gradient = layer.lora_route.weight.grad
    assert (gradient is not None and bool(gradient.abs().sum() > 1e-6)) == learns


def test_the_icedit_targets_are_343_modules_of_flux():
    class Block(nn.Module):
        pass

    def tree(paths):
        root = Block()
        for path in paths:
            owner = root
            *parents, leaf = path.split(".")
            for name in parents:
                if name not in owner._modules:
                    owner.add_module(name, Block())
                owner = owner._modules[name]
            owner.add_module(leaf, nn.Linear(1, 1, device="meta"))
        return root

    double = "norm1.linear norm1_context.linear attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj "
    double += "attn.add_k_proj attn.add_v_proj attn.to_add_out ff.net.0.proj ff.net.2 ff_context.net.0.proj"
    single = "norm.linear proj_mlp proj_out attn.to_q attn.to_k attn.to_v"
    paths = ["x_embedder", "context_embedder", "proj_out", "norm_out.linear"]
    paths += [f"transformer_blocks.{i}.{n}" for i in range(19) for n in double.split()]
    paths += [f"single_transformer_blocks.{i}.{n}" for i in range(38) for n in single.split()]
    module = tree(paths)
    found = adapters._matching(module, FillTask.target_modules)
    assert len(found) == 343 and "proj_out" not in found
    import re

    assert sum(bool(re.fullmatch(adapters.MOE_TARGETS, name)) for name in found) == 57


def test_average_and_schedule():
    parameter = nn.Parameter(torch.zeros(3))
    average = optim.MovingAverage({"p": parameter}, 0.5)
    parameter.data.fill_(1.0)
    average.update({"p": parameter})
    first = 1 - min(0.5, 2 / 11)
    assert torch.allclose(average.values["p"], torch.full((3,), first))
    average.swap({"p": parameter})
    assert torch.allclose(parameter.data, torch.full((3,), first)) and average.values["p"][0] == 1.0
    c = SimpleNamespace(lr_warmup=10, lr_schedule="cosine", max_steps=110)
    assert [round(optim.lr_factor(s, c), 6) for s in (0, 9, 10, 60, 110)] == [0.1, 1.0, 1.0, 0.5, 0.0]
