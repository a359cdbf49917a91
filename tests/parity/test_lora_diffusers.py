"""A LoRA on diffusers modules equals merging its dense change, and comes off without trace."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.models.lora import (
    Factored,
    FullTensor,
    LoraError,
    LoraInfo,
    LoraWeights,
    LowRank,
    MoeLowRank,
    apply_to_diffusers,
    from_peft,
    read,
    save,
)

ATTENTION = ("to_q", "to_k", "to_v")


@pytest.fixture
def transformer(fill_pipeline):
    import copy

    return copy.deepcopy(fill_pipeline.transformer)


def inputs(model, tokens=6):
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(tokens, 3)
    ids[:, 2] = torch.arange(tokens)
    return {
        "hidden_states": torch.randn(2, tokens, model.config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(2, 4, 32, generator=generator),
        "pooled_projections": torch.randn(2, 32, generator=generator),
        "timestep": torch.tensor([0.7, 0.7]),
        "img_ids": ids,
        "txt_ids": torch.zeros(4, 3),
        "guidance": torch.tensor([30.0, 30.0]),
    }


@torch.no_grad()
def run(model):
    return model(**inputs(model), return_dict=False)[0]


def plain(model, rank=3, scale=0.5, seed=0, names=None):
    generator = torch.Generator().manual_seed(seed)
    names = names or [
        *(f"transformer_blocks.0.attn.{n}" for n in ATTENTION),
        "transformer_blocks.0.attn.to_out.0",
        "transformer_blocks.0.norm1.linear",
        *(f"single_transformer_blocks.1.attn.{n}" for n in ATTENTION),
        "single_transformer_blocks.1.proj_mlp",
        "x_embedder",
        "norm_out.linear",
    ]
    modules = {}
    for name in names:
        out, width = model.get_submodule(name).weight.shape
        A, B = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
        modules[name] = LowRank(A * 0.1, B * 0.1, scale)
    return modules


def experts(model, name="single_transformer_blocks.0.proj_out", seed=4):
    generator = torch.Generator().manual_seed(seed)
    out, width = model.get_submodule(name).weight.shape
    shapes = (4, 2, width), (4, out, 2), (4, width)
    return {name: MoeLowRank(*(torch.randn(s, generator=generator) * 0.2 for s in shapes), scale=0.5)}


def merged(model, modules, strength=1.0):
    import copy

    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in modules.items():
            model.get_submodule(name).weight += strength * module.dense()
    return run(model)


def test_plain_lora_equals_the_merged_weights(transformer):
    modules = plain(transformer)
    want = merged(transformer, modules, 0.8)
    base = run(transformer)
    handle = apply_to_diffusers(transformer, LoraWeights(modules), 0.8)
    assert (run(transformer) - want).abs().max() < 1e-4
    assert (want - base).abs().max() > 1e-2
    handle.unpatch()


def test_unpatch_leaves_no_trace(transformer):
    keys, types = list(transformer.state_dict()), [type(m) for m in transformer.modules()]
    grads = {n: p.requires_grad for n, p in transformer.named_parameters()}
    base = run(transformer)
    weights = LoraWeights(plain(transformer) | experts(transformer))
    apply_to_diffusers(transformer, weights).unpatch()
    assert torch.equal(run(transformer), base)
    assert list(transformer.state_dict()) == keys and [type(m) for m in transformer.modules()] == types
    assert {n: p.requires_grad for n, p in transformer.named_parameters()} == grads
    assert not hasattr(transformer, "peft_config")


def test_different_ranks_and_scales_each_keep_their_own(transformer):
    names = ["x_embedder", "transformer_blocks.0.attn.to_q"]
    modules = plain(transformer, 2, 3.0, names=names[:1]) | plain(transformer, 5, 0.2, names=names[1:])
    want = merged(transformer, modules)
    apply_to_diffusers(transformer, LoraWeights(modules))
    assert (run(transformer) - want).abs().max() < 1e-4


def test_two_loras_stack_and_come_off_in_any_order(transformer):
    first, second = plain(transformer, seed=1), plain(transformer, rank=2, seed=2)
    alone = merged(transformer, second)
    base = run(transformer)
    one = apply_to_diffusers(transformer, LoraWeights(first), 0.7)
    two = apply_to_diffusers(transformer, LoraWeights(second))
    one.unpatch()
    assert (run(transformer) - alone).abs().max() < 1e-4
    two.unpatch()
    assert torch.equal(run(transformer), base)


def test_experts_change_the_layer_as_the_loop_does(transformer):
    (name, moe), *_ = experts(transformer).items()
    layer = transformer.get_submodule(name)
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        want = layer(x)
        chosen = (x @ moe.router.T).argmax(-1)
        for b, t in [(b, t) for b in range(2) for t in range(5)]:
            e = chosen[b, t]
            want[b, t] += 0.6 * moe.scale * (moe.B[e] @ (moe.A[e] @ x[b, t]))
        apply_to_diffusers(transformer, LoraWeights({name: moe}), 0.6)
        assert (layer(x) - want).abs().max() < 1e-5


def test_experts_stack_with_a_plain_lora_on_the_same_layer(transformer):
    name = "single_transformer_blocks.0.proj_out"
    moe, low = experts(transformer), plain(transformer, names=[name])
    apply_to_diffusers(transformer, LoraWeights(moe))
    expected_base = run(transformer)
    handle = apply_to_diffusers(transformer, LoraWeights(low))
    assert (run(transformer) - expected_base).abs().max() > 1e-3
    handle.unpatch()
    assert torch.equal(run(transformer), expected_base)


def test_the_window_switches_with_sigma(transformer):
    modules = plain(transformer) | experts(transformer)
    base = run(transformer)
    handle = apply_to_diffusers(transformer, LoraWeights(modules), window=(0.9, 0.4))
    on = run(transformer)
    handle.at_sigma(1.0)
    assert torch.equal(run(transformer), base)
    handle.at_sigma(0.9)
    assert torch.equal(run(transformer), on) and not torch.equal(on, base)
    handle.at_sigma(0.4)
    assert torch.equal(run(transformer), base)


def test_a_stored_window_is_the_default(transformer):
    weights = LoraWeights(plain(transformer), info=LoraInfo(sigma_window=(1.0, 0.5)))
    assert apply_to_diffusers(transformer, weights).window == (1.0, 0.5)


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_lycoris_factors_equal_the_merged_weights(transformer, kind):
    name = "transformer_blocks.0.attn.to_q"
    generator = torch.Generator().manual_seed(5)
    shapes = {"w1": (6, 8), "w2": (8, 6)}
    if kind == "loha":
        shapes = {"w1_a": (48, 2), "w1_b": (2, 48), "w2_a": (48, 2), "w2_b": (2, 48)}
    factors = {k: torch.randn(s, generator=generator) * 0.3 for k, s in shapes.items()}
    modules = {name: Factored(kind, factors, 0.5)}
    want = merged(transformer, modules)
    apply_to_diffusers(transformer, LoraWeights(modules))
    assert (run(transformer) - want).abs().max() < 1e-4


def test_whole_tensors_are_added_and_taken_off_exactly(transformer):
    bias = transformer.proj_out.bias.detach().clone()
    full = {"proj_out.bias": FullTensor(torch.ones_like(bias), "diff")}
    handle = apply_to_diffusers(transformer, LoraWeights(plain(transformer), full), 0.5)
    torch.testing.assert_close(transformer.proj_out.bias.detach(), bias + 0.5)
    handle.unpatch()
    assert torch.equal(transformer.proj_out.bias.detach(), bias)


def test_a_dev_lora_on_fill_is_padded_not_dropped(transformer):
    generator = torch.Generator().manual_seed(6)
    A, B = torch.randn(3, 64, generator=generator), torch.randn(48, 3, generator=generator)
    wide = LowRank(torch.nn.functional.pad(A, (0, 320)), B)
    want = merged(transformer, {"x_embedder": wide})
    handle = apply_to_diffusers(transformer, LoraWeights({"x_embedder": LowRank(A, B)}))
    assert (run(transformer) - want).abs().max() < 1e-4
    assert "padded with zero columns" in str(handle)


def refused(transformer, weights, message):
    keys, base = list(transformer.state_dict()), run(transformer)
    with pytest.raises(LoraError, match=message):
        apply_to_diffusers(transformer, weights)
    assert list(transformer.state_dict()) == keys and torch.equal(run(transformer), base)


def test_another_base_is_refused_by_name_and_the_model_stays_untouched(transformer):
    modules = plain(transformer) | {
        "transformer_blocks.0.attn.to_q": LowRank(torch.ones(2, 99), torch.ones(48, 2))
    }
    refused(
        transformer,
        LoraWeights(modules),
        "transformer_blocks.0.attn.to_q is 99 -> 48, the model's is 48 -> 48",
    )


def test_a_fill_lora_on_a_kontext_model_is_refused(kontext_pipeline):
    weights = LoraWeights({"x_embedder": LowRank(torch.ones(2, 384), torch.ones(48, 2))})
    refused(kontext_pipeline.transformer, weights, "for FLUX Fill .* the model is FLUX dev or Kontext")


def test_a_lora_of_another_family_is_refused(transformer):
    weights = LoraWeights({"down_blocks.0.attn1.to_q": LowRank(torch.ones(2, 8), torch.ones(8, 2))})
    refused(transformer, weights, "has none of its layers")


def test_a_checkpoint_is_refused_with_the_way_out(transformer):
    full = {"proj_out.weight": FullTensor(torch.ones(64, 48), "set")}
    refused(transformer, LoraWeights({}, full, LoraInfo(format="full checkpoint")), "full fine-tuned model")


def test_layers_the_model_lacks_are_reported(transformer):
    extra = {"transformer_blocks.7.attn.to_q": LowRank(torch.ones(2, 48), torch.ones(48, 2))}
    report = apply_to_diffusers(transformer, LoraWeights(plain(transformer) | extra)).report
    assert report.skipped == (("transformer_blocks.7.attn.to_q", "this model has no such layer"),)
    assert "no such layer" in str(report)


def test_our_files_load_in_diffusers_at_the_trained_strength(fill_pipeline, tmp_path):
    transformer = fill_pipeline.transformer
    modules = plain(transformer, scale=2.0)
    want = merged(transformer, modules)
    save(tmp_path / "pytorch_lora_weights.safetensors", LoraWeights(modules, info=LoraInfo(base="FLUX Fill")))
    fill_pipeline.load_lora_weights(tmp_path, adapter_name="ours")
    try:
        assert (run(transformer) - want).abs().max() < 1e-4
    finally:
        fill_pipeline.unload_lora_weights()


def test_a_trained_peft_adapter_is_captured_with_its_scale(transformer, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False)
    inject_adapter_in_model(config, transformer, "policy")
    weights = from_peft(transformer, "policy")
    trained = run(transformer)
    import copy

    clean = copy.deepcopy(transformer)
    for name in list(weights.modules):
        parent, _, child = name.rpartition(".")
        setattr(clean.get_submodule(parent), child, clean.get_submodule(name).get_base_layer())
    apply_to_diffusers(clean, read(save(tmp_path / "l.safetensors", weights)))
    assert (run(clean) - trained).abs().max() < 1e-4


def test_trainable_leaves_the_factors_with_gradients_and_the_base_as_it_was(transformer):
    transformer.requires_grad_(False)
    apply_to_diffusers(transformer, LoraWeights(plain(transformer)), trainable=True)
    trained = [n for n, p in transformer.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in n for n in trained)
