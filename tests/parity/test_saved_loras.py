"""A trained LoRA gives the same effective weights in diffusers, in peft and in our own loader.

ComfyUI's core is the fourth reader: `tests/comfyui/comfy_cases/saved_loras.py`.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from comfyui_diptych.models import lora
from comfyui_diptych.training import recipes
from comfyui_diptych.training.tasks import adapters, export, initial
from comfyui_diptych.training.tasks.families import FAMILIES, make_task
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

HEADER = {"base": "toy", "recipe": "test", "step": 7, "data": "abc", "prompt_template": "{instruction}"}


def trained(module: nn.Module, task: str, method: str = "lora", patterns: list[str] | None = None, **options):
    """A copy of the module with non-zero adapters, and its configuration (alpha is not the rank)."""
    c = recipes.from_dict({"task": task, "method": method, "rank": 4, "lora_alpha": 6.0, **options})
    module = copy.deepcopy(module)
    adapters.add_lora(module, patterns or FAMILIES[task].target_modules, c)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return module, c


def changes(module: nn.Module) -> dict[str, torch.Tensor]:
    """B A alpha / r of every plain adapter, straight from the layers."""
    out = {}
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            product = up.flatten(1) @ down.flatten(1) * (6.0 / 4)
            out[name] = product.view(len(up), *down.shape[1:])
    return out


def merged(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace(".base_layer", ""): p.detach().clone() for name, p in module.named_parameters()}


def write(module, c, path, part="transformer"):
    return export.save_lora(path, {part: adapters.trained_state(module)}, c, HEADER)


@pytest.mark.parametrize("task", ["fill", "kontext"])
def test_diffusers_peft_and_ours_give_the_trained_change(task, request, tmp_path):
    pipeline = request.getfixturevalue(f"{task}_pipeline")
    module, c = trained(pipeline.transformer, task)
    path = write(module, c, tmp_path / "lora.safetensors")
    wanted, base = changes(module), merged(pipeline.transformer)
    assert len(wanted) > 10

    theirs = copy.deepcopy(pipeline)
    theirs.load_lora_weights(str(path))
    theirs.fuse_lora()
    theirs.unload_lora_weights()

    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["lora_adapter_metadata"])
    fields = {k.removeprefix("transformer."): v for k, v in meta.items()}
    by_peft = inject_adapter_in_model(LoraConfig(**fields), copy.deepcopy(pipeline.transformer))
    state = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    outcome = set_peft_model_state_dict(by_peft, state)
    assert not outcome.unexpected_keys
    for layer in by_peft.modules():
        if hasattr(layer, "merge") and hasattr(layer, "lora_A"):
            layer.merge()

    ours = lora.read(path)
    for name, change in wanted.items():
        weight = f"{name}.weight"
        assert torch.allclose(ours.modules[name].dense(), change, atol=1e-5), name
        assert torch.allclose(merged(theirs.transformer)[weight] - base[weight], change, atol=1e-5), name
        assert torch.allclose(merged(by_peft)[weight] - base[weight], change, atol=1e-5), name
    untouched = set(base) - {f"{n}.weight" for n in wanted}
    assert all(torch.equal(merged(theirs.transformer)[n], base[n]) for n in untouched)


@pytest.mark.parametrize("gate", ["softmax_all", "softmax_topk"])
def test_a_trained_moe_lora_runs_the_same_through_our_loader(gate, fill_pipeline, tmp_path):
    module, c = trained(fill_pipeline.transformer, "fill", "moe_lora", moe_gate=gate)
    path = write(module, c, tmp_path / "moe.safetensors")
    applied = copy.deepcopy(fill_pipeline.transformer)
    handle = lora.apply_to_diffusers(applied, lora.read(path))
    assert not handle.report.skipped
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 8, 384),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.ones(2),
        "img_ids": torch.zeros(8, 3),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }
    with torch.no_grad():
        want, got, base = (m(**inputs)[0] for m in (module, applied, fill_pipeline.transformer))
    assert torch.allclose(got, want, atol=1e-5) and (want - base).abs().max() > 1e-2
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["diptych"])
    assert header["moe_gate"] == gate and header["moe_experts"] == 4
    assert {k: header[k] for k in HEADER} == HEADER


@pytest.mark.parametrize(
    "patterns", [None, [r".*\.(to_[qkv]|conv[12]?|conv_shortcut|time_emb_proj)"]], ids=["attention", "all"]
)
def test_a_stable_diffusion_lora_has_kohya_names_and_loads_in_diffusers(
    patterns, sd_inpaint_pipeline, tmp_path
):
    module, c = trained(sd_inpaint_pipeline.unet, "sd_inpaint", patterns=patterns)
    assert any(change.ndim == 4 for change in changes(module).values()) == bool(patterns)
    text, _ = trained(sd_inpaint_pipeline.text_encoder, "sd_inpaint", patterns=adapters.TEXT_TARGETS)
    parts = {"unet": adapters.trained_state(module), "text_encoder": adapters.trained_state(text)}
    path = export.save_lora(tmp_path / "sd.safetensors", parts, c, HEADER)
    keys = load_file(path).keys()
    assert all(k.startswith(("lora_unet_", "lora_te_")) for k in keys)
    assert any(k.startswith("lora_te_text_model_encoder") for k in keys)
    wanted = changes(module)
    ours = lora.read(path)
    for name, change in wanted.items():
        assert torch.allclose(ours.modules[name].dense(), change, atol=1e-5), name
    theirs = copy.deepcopy(sd_inpaint_pipeline)
    theirs.load_lora_weights(str(path))
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    for part, adapted in (("unet", module), ("text_encoder", text)):
        base, after = merged(getattr(sd_inpaint_pipeline, part)), merged(getattr(theirs, part))
        for name, change in changes(adapted).items():
            assert torch.allclose(after[f"{name}.weight"] - base[f"{name}.weight"], change, atol=1e-5), name


def test_full_training_leaves_a_folder_that_the_stock_pipeline_loads(fill_pipeline, tmp_path):
    from diffusers import FluxFillPipeline

    fill_pipeline.save_pretrained(tmp_path / "base")
    module = copy.deepcopy(fill_pipeline.transformer)
    nn.init.constant_(module.proj_out.bias, 0.25)
    folder = export.save_pipeline(tmp_path / "new", str(tmp_path / "base"), {"transformer": module})
    loaded = FluxFillPipeline.from_pretrained(folder)
    assert torch.equal(loaded.transformer.proj_out.bias, module.proj_out.bias)


def test_a_lora_is_merged_before_training_at_the_strength_beside_its_name(fill_pipeline, tmp_path):
    module, c = trained(fill_pipeline.transformer, "fill")
    path = write(module, c, tmp_path / "lora.safetensors")
    base = merged(fill_pipeline.transformer)
    fill_pipeline.save_pretrained(tmp_path / "model")
    options = {"task": "fill", "model": str(tmp_path / "model"), "base_dtype": "float32"}
    given = recipes.from_dict({**options, "fuse_loras": [f"{path}:0.5"], "gradient_checkpointing": False})
    half = merged(make_task(given).load_denoiser())
    for name, change in changes(module).items():
        wanted = base[f"{name}.weight"] + change / 2
        torch.testing.assert_close(half[f"{name}.weight"], wanted, atol=1e-6, rtol=1e-5)


def test_a_small_change_survives_a_float8_base(fill_pipeline, tmp_path):
    """Merged after the cast it would round back: a change of 1 % is below half a float8 step."""
    module, c = trained(fill_pipeline.transformer, "fill")
    base = merged(fill_pipeline.transformer)
    change = {name: tensor.detach() for name, tensor in changes(module).items()}
    name = max(change, key=lambda n: change[n].numel())
    strength = 0.01 * float(base[f"{name}.weight"].norm() / change[name].norm())
    path = write(module, c, tmp_path / "lora.safetensors")
    fill_pipeline.save_pretrained(tmp_path / "model")
    options = {"task": "fill", "model": str(tmp_path / "model"), "base_dtype": "float8_e4m3fn"}
    options |= {"gradient_checkpointing": False}

    def weight(**fused):
        loaded = make_task(recipes.from_dict(options | fused)).load_denoiser()
        assert loaded.get_submodule(name).weight.dtype == torch.float8_e4m3fn
        return loaded.get_submodule(name).weight.float()

    wanted = strength * change[name]
    left = weight(fuse_loras=[f"{path}:{strength}"]) - weight()
    assert float((left * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.1)


def test_what_a_merge_cannot_keep_is_said_before_the_work_or_in_the_log(fill_pipeline, tmp_path, caplog):
    module, c = trained(fill_pipeline.transformer, "fill", "moe_lora")
    options = {"task": "fill", "model": "x"}
    path = str(write(module, c, tmp_path / "moe.safetensors"))
    with pytest.raises(ValueError, match="has experts, chosen by token"):
        initial.check_loras(recipes.from_dict({**options, "fuse_loras": [path]}))
    with pytest.raises(ValueError, match="more than plain LoRA factors"):
        initial.check_loras(recipes.from_dict({**options, "init_lora": path}))
    module, c = trained(fill_pipeline.transformer, "fill")
    parts = {"transformer": adapters.trained_state(module)}
    path = export.save_lora(tmp_path / "w.safetensors", parts, c, HEADER | {"sigma_window": [0.9, 0.4]})
    initial.fuse(copy.deepcopy(fill_pipeline.transformer), str(path))
    assert "its sigma window is not kept" in caplog.text


def test_whole_tensors_and_every_kind_of_change_are_merged(fill_pipeline, tmp_path):
    from safetensors.torch import save_file

    transformer, path = copy.deepcopy(fill_pipeline.transformer), tmp_path / "x.safetensors"
    name = "transformer_blocks.0.attn.to_q"
    layer = transformer.get_submodule(name)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    down, up, m = torch.randn(3, 48), torch.randn(48, 3), 1 + torch.rand(48, 1)
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "dora_scale": m, "diff_b": torch.ones(48)}
    save_file({f"transformer.{name}.{k}": t for k, t in tensors.items()}, path)
    initial.fuse(transformer, str(path), 0.5)
    full = m * (before + up @ down) / (before + up @ down).norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.weight.detach(), before + 0.5 * (full - before), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.bias.detach(), bias + 0.5)
