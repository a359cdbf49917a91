"""Folders that peft itself wrote, of every adapter kind, change a model exactly as peft changes it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from comfyui_diptych.models.lora import apply_to_diffusers, from_peft, read

NAMES = [
    "x_embedder",
    "transformer_blocks.0.attn.to_q",
    "single_transformer_blocks.1.proj_mlp",
    "norm_out.linear",
]


def configs():
    import peft

    lora = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    oft = {"r": 0, "oft_block_size": 8}
    return {
        "lora": peft.LoraConfig(**lora),
        "rslora": peft.LoraConfig(**lora, use_rslora=True),
        "patterns": peft.LoraConfig(**lora, rank_pattern={"to_q": 2}, alpha_pattern={r"attn\.to_[qk]": 3}),
        "biases": peft.LoraConfig(**lora, bias="all"),
        "dora": peft.LoraConfig(**lora, use_dora=True),
        "loha": peft.LoHaConfig(r=3, alpha=5),
        "lokr": peft.LoKrConfig(r=2, alpha=5),
        "lokr, whole factors": peft.LoKrConfig(r=64, alpha=32),
        "lokr, both decomposed": peft.LoKrConfig(r=1, alpha=2, decompose_both=True),
        "oft": peft.OFTConfig(**oft),
        "oft, exact inverse": peft.OFTConfig(**oft, use_cayley_neumann=False),
        "oft, three terms": peft.OFTConfig(**oft, num_cayley_neumann_terms=3),
        "oft, one block for all": peft.OFTConfig(**oft, block_share=True),
        "boft": peft.BOFTConfig(boft_block_size=8),
    }


@pytest.fixture(params=list(configs()))
def by_peft(request, fill_pipeline, tmp_path):
    """(model with a peft adapter of random weights, the folder that peft saved it to)."""
    import peft

    config = configs()[request.param]
    config.target_modules = {name for name in NAMES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(fill_pipeline.transformer), config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        biases = request.param == "biases" and name.endswith("to_q.base_layer.bias")
        if biases or any(kind in name for kind in ("lora_", "hada_", "lokr_", "oft_R", "boft_")):
            near_one = "boft_s" in name or "magnitude" in name
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data = parameter.data * (1 + noise) if near_one else noise
    model.save_pretrained(tmp_path)
    return model, tmp_path


def predict(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 6, 384, generator=generator),
            encoder_hidden_states=torch.randn(1, 4, 32, generator=generator),
            pooled_projections=torch.randn(1, 32, generator=generator),
            timestep=torch.tensor([0.7]),
            img_ids=torch.arange(18.0).reshape(6, 3),
            txt_ids=torch.zeros(4, 3),
            guidance=torch.tensor([30.0]),
            return_dict=False,
        )[0]


def test_a_folder_of_peft_changes_the_model_as_peft_does(by_peft, fill_pipeline):
    model, folder = by_peft
    want, ours = predict(model), copy.deepcopy(fill_pipeline.transformer)
    base, before = predict(ours), copy.deepcopy(ours.state_dict())
    weights = read(folder)
    assert sorted(weights.modules) == sorted(NAMES) and not weights.skipped
    handle = apply_to_diffusers(ours, weights)
    assert (predict(ours) - want).abs().max() < 1e-4 < (want - base).abs().max()
    handle.set_strength(0.5)
    assert not torch.equal(predict(ours), want)
    handle.set_strength(0.0)
    assert torch.equal(predict(ours), base)
    handle.unpatch()
    after = ours.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], t) for k, t in before.items())


@pytest.mark.parametrize("by_peft", ["dora"], indirect=True)
def test_a_dora_living_on_a_model_is_captured_whole(by_peft, fill_pipeline):
    model, _ = by_peft
    ours = copy.deepcopy(fill_pipeline.transformer)
    apply_to_diffusers(ours, from_peft(model))
    assert (predict(ours) - predict(model)).abs().max() < 1e-4
