"""What a training starts from: another model's weights, a LoRA, fresh ones; against the models themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from comfyui_diptych.models import lora
from comfyui_diptych.models.packing import image_ids
from comfyui_diptych.training import recipes
from comfyui_diptych.training.tasks import adapters, export, initial
from comfyui_diptych.training.tasks.families import FAMILIES

FILL = FAMILIES["fill"].target_modules


def predict(module, tokens):
    torch.manual_seed(1)
    batch, width = len(tokens), module.config.joint_attention_dim
    with torch.no_grad():
        return module(
            hidden_states=tokens,
            timestep=torch.full((batch,), 0.6),
            guidance=torch.full((batch,), 3.0),
            pooled_projections=torch.randn(batch, module.config.pooled_projection_dim),
            encoder_hidden_states=torch.randn(batch, 5, width),
            txt_ids=torch.zeros(5, 3),
            img_ids=image_ids(4, 8),
        ).sample


def test_kontext_from_fill_reads_the_noisy_channels_as_fill_does(fill_pipeline):
    fill = copy.deepcopy(fill_pipeline.transformer).eval()
    narrow = initial.with_inputs(fill, 64).eval()
    tokens = torch.randn(2, 8, 64)
    blank = torch.nn.functional.pad(tokens, (0, 320))
    assert narrow.config.in_channels == 64
    assert torch.allclose(predict(narrow, tokens), predict(fill, blank), atol=1e-6)


def test_fill_from_a_plain_flux_begins_as_that_model_whatever_the_mask_is(kontext_pipeline):
    flux = copy.deepcopy(kontext_pipeline.transformer).eval()
    wide = initial.with_inputs(flux, 384).eval()
    tokens = torch.randn(2, 8, 384)
    assert wide.config.in_channels == 384
    assert torch.allclose(predict(wide, tokens), predict(flux, tokens[..., :64]), atol=1e-6)


def test_the_same_inputs_are_the_same_module(fill_pipeline):
    assert initial.with_inputs(fill_pipeline.transformer, 384) is fill_pipeline.transformer


def test_fresh_weights_with_zero_modulation_predict_zero(fill_pipeline):
    module = type(fill_pipeline.transformer).from_config(fill_pipeline.transformer.config).eval()
    assert predict(module, torch.randn(2, 8, 384)).abs().max() > 1e-3
    initial.zero_modulation(module)
    assert predict(module, torch.randn(2, 8, 384)).abs().max() == 0


@pytest.fixture
def saved(fill_pipeline, tmp_path):
    """(the module with a LoRA of rank 4 and alpha 6, its file)."""
    c = recipes.from_dict({"task": "fill", "rank": 4, "lora_alpha": 6.0})
    module = copy.deepcopy(fill_pipeline.transformer).eval()
    adapters.add_lora(module, FILL, c)
    torch.manual_seed(0)
    for parameter in adapters.trained_parameters(module).values():
        parameter.data = torch.randn(parameter.shape) * 0.1
    path = tmp_path / "lora.safetensors"
    export.save_lora(path, {"transformer": adapters.trained_state(module)}, c, {"base": "toy"})
    return module, path


@pytest.mark.parametrize("rank", [4, 7])
def test_adapters_that_have_room_begin_as_the_lora(fill_pipeline, saved, rank):
    module, path = saved
    c = recipes.from_dict({"task": "fill", "rank": rank, "lora_alpha": 5.0})
    fresh = copy.deepcopy(fill_pipeline.transformer).eval()
    adapters.add_lora(fresh, FILL, c)
    initial.from_lora(fresh, str(path), c)
    tokens = torch.randn(2, 8, 384)
    assert torch.allclose(predict(fresh, tokens), predict(module, tokens), atol=1e-5)


def test_adapters_of_a_lower_rank_begin_as_the_best_approximation(fill_pipeline, saved):
    _, path = saved
    c = recipes.from_dict({"task": "fill", "rank": 2, "lora_alpha": 2.0})
    fresh = copy.deepcopy(fill_pipeline.transformer)
    adapters.add_lora(fresh, FILL, c)
    initial.from_lora(fresh, str(path), c)
    layers = dict(fresh.named_modules())
    for name, change in lora.read(path).modules.items():
        dense = change.scale * change.B.double() @ change.A.double()
        u, s, v = torch.linalg.svd(dense)
        best = u[:, :2] * s[:2] @ v[:2]
        got = layers[name].lora_B["default"].weight @ layers[name].lora_A["default"].weight
        assert torch.allclose(got.double(), best, atol=1e-5), name


def test_experts_begin_near_their_modules_lora(fill_pipeline, saved):
    module, path = saved
    options = {"task": "fill", "method": "moe_lora", "rank": 4, "lora_alpha": 4.0}
    tokens, base = torch.randn(2, 8, 384), fill_pipeline.transformer.eval()
    wanted = predict(module, tokens) - predict(base, tokens)

    def distance(start):
        torch.manual_seed(0)
        c = recipes.from_dict(options)
        fresh = copy.deepcopy(base)
        adapters.add_lora(fresh, FILL, c)
        if start:
            initial.from_lora(fresh, str(path), c)
        return (predict(fresh.eval(), tokens) - predict(base, tokens) - wanted).norm() / wanted.norm()

    assert distance(True) < 0.5 < 0.99 < distance(False)


def test_a_lora_of_another_model_is_refused(fill_pipeline, sd_inpaint_pipeline, saved):
    c = recipes.from_dict({"task": "sd_inpaint", "rank": 4})
    unet = copy.deepcopy(sd_inpaint_pipeline.unet)
    adapters.add_lora(unet, FAMILIES["sd_inpaint"].target_modules, c)
    with pytest.raises(ValueError, match="fits none of target_modules"):
        initial.from_lora(unet, str(saved[1]), c)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("transformer.proj_out.lora_", r"changes 1 layers that are not trained \(proj_out\).*fuse_loras"),
        (
            "transformer.transformer_blocks.0.attn.to_q.diff_b",
            "more than plain LoRA factors.*to_q.bias.*fuse_loras",
        ),
    ],
)
def test_a_lora_of_which_a_part_would_be_lost_is_refused(entry, words, fill_pipeline, saved, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved[1])
    if entry.endswith("_"):
        tensors |= {f"{entry}A.weight": torch.ones(4, 48), f"{entry}B.weight": torch.ones(64, 4)}
    else:
        tensors[entry] = torch.ones(48)
    save_file(tensors, tmp_path / "more.safetensors")
    c = recipes.from_dict({"task": "fill", "rank": 4})
    fresh = copy.deepcopy(fill_pipeline.transformer)
    adapters.add_lora(fresh, FILL, c)
    with pytest.raises(ValueError, match=words):
        initial.from_lora(fresh, str(tmp_path / "more.safetensors"), c)
    assert all(p.eq(0).all() for n, p in fresh.named_parameters() if "lora_B" in n)
