"""Several namings in one file, several names of one file: nothing is lost and nothing taken for another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from comfyui_diptych.commands import loras
from comfyui_diptych.models import tiny
from comfyui_diptych.models.lora import LoraError, apply_to_diffusers, read
from comfyui_diptych.models.lora.files import RawFile
from comfyui_diptych.models.lora.fit import base_notes, fit_module
from comfyui_diptych.models.lora.kinds import LowRank
from comfyui_diptych.models.lora.read import canonical
from safetensors.torch import save_file
from torch import nn

R, H = 2, 6
TO_Q = "transformer_blocks.0.attn.to_q"
NAMINGS = {
    "diffusers": (f"transformer.{TO_Q}", "lora_A.weight", "lora_B.weight"),
    "peft": (f"base_model.model.{TO_Q}", "lora_A.weight", "lora_B.weight"),
    "bare": (TO_Q, "lora_A.default.weight", "lora_B.default.weight"),
    "OneTrainer": (f"lora_transformer_{TO_Q.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
    "kohya": ("lora_unet_double_blocks_0_img_attn_qkv", "lora_down.weight", "lora_up.weight"),
    "BFL": ("diffusion_model.double_blocks.0.img_attn.qkv", "lora_A.weight", "lora_B.weight"),
}


def entry(naming, seed=0, alpha=None):
    layer, down, up = NAMINGS[naming]
    generator = torch.Generator().manual_seed(seed)
    out = 3 * H if naming in ("kohya", "BFL") else H
    A, B = torch.randn(R, H, generator=generator), torch.randn(out, R, generator=generator)
    tensors = {f"{layer}.{down}": A, f"{layer}.{up}": B}
    if alpha is not None:
        tensors[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return tensors, (1 if alpha is None else alpha / R) * (B @ A)[:H]


def parsed(tensors, **header):
    return canonical(RawFile(Path("x.safetensors"), tensors, header))


PAIRS = [(a, b) for i, a in enumerate(NAMINGS) for b in list(NAMINGS)[i + 1 :]]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_namings_of_one_layer_add_up(one, other):
    first, want = entry(one, 1, alpha=3)
    second, more = entry(other, 2)
    weights = parsed(first | second)
    torch.testing.assert_close(weights.modules[TO_Q].dense(), want + more, atol=1e-5, rtol=1e-5)
    assert not weights.skipped and any("added up" in note for note in weights.notes)


def test_the_same_change_stored_under_two_namings_counts_once():
    first, want = entry("diffusers", 1)
    second, _ = entry("peft", 1)
    weights = parsed(first | second)
    torch.testing.assert_close(weights.modules[TO_Q].dense(), want)
    assert any("counts once" in note for note in weights.notes)


def test_changes_that_cannot_be_added_up_are_named():
    first, _ = entry("diffusers", 1)
    loha = {
        f"lycoris_{TO_Q.replace('.', '_')}.hada_{n}": torch.ones(*s)
        for n, s in (("w1_a", (H, R)), ("w1_b", (R, H)), ("w2_a", (H, R)), ("w2_b", (R, H)))
    }
    with pytest.raises(LoraError, match=f"two changes of {TO_Q}"):
        parsed(first | loha)


def test_what_means_nothing_beside_a_layers_factors_is_listed():
    first, _ = entry("diffusers", 1)
    first[f"transformer.{TO_Q}.scalar"] = torch.ones(1)
    first[f"transformer.{TO_Q}.lora_A.bias"] = torch.ones(R)
    weights = parsed(first)
    assert {key for key, _ in weights.skipped} == {f"transformer.{TO_Q}.scalar", f"transformer.{TO_Q}.A_bias"}


def test_a_lora_of_the_last_layer_leaves_the_layers_that_end_like_it_alone():
    module = nn.Module()
    module.proj_out, module.block = nn.Linear(H, H), nn.Module()
    module.block.proj_out = nn.Linear(H, H)
    x = torch.randn(2, H)
    want, A, B = module.block.proj_out(x), torch.randn(R, H), torch.randn(H, R)
    tensors = {"transformer.proj_out.lora_A.weight": A, "transformer.proj_out.lora_B.weight": B}
    last = module.proj_out(x) + x @ (B @ A).T
    handle = apply_to_diffusers(module, parsed(tensors))
    assert torch.equal(module.block.proj_out(x), want) and type(module.block.proj_out) is nn.Linear
    torch.testing.assert_close(module.proj_out(x), last)
    handle.unpatch()
    assert type(module.proj_out) is nn.Linear


@pytest.mark.parametrize(
    "name",
    [
        "UPPER.SAFETENSORS",
        "Zug über Ösen é.safetensors",
        "with space (1).safetensors",
        "v1.2.final.safetensors",
        "日本語.safetensors",
        "weights.sft",
        "no suffix",
        "a:b.safetensors",
    ],
)
def test_files_are_read_whatever_their_name(name, tmp_path):
    tensors, want = entry("diffusers")
    save_file(tensors, tmp_path / "x.safetensors")
    (tmp_path / "sub folder").mkdir()
    path = shutil.move(tmp_path / "x.safetensors", tmp_path / "sub folder" / name)
    weights = read(path)
    assert weights.name == name
    torch.testing.assert_close(weights.modules[TO_Q].dense(), want)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".PT"])
def test_torch_files_are_read_whatever_their_name(suffix, tmp_path):
    tensors, want = entry("diffusers", alpha=3)
    tensors[f"transformer.{TO_Q}.alpha"] = 3.0  # a number as it is
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / f"x{suffix}")
    torch.testing.assert_close(read(tmp_path / f"x{suffix}").modules[TO_Q].dense(), want)


@pytest.mark.parametrize(
    ("stated", "inputs", "told"),
    [
        ("FLUX.1 Kontext", 384, True),
        ("black-forest-labs/FLUX.1-Kontext-dev", 384, True),
        ("black-forest-labs/FLUX.1-Fill-dev", 64, True),
        ("models--black-forest-labs--FLUX.1-Fill-dev/snapshots/0a1", 384, False),
        ("flux-1-dev/lora", 384, False),
        ("FLUX.1 Kontext", 64, False),
        ("runs/fulfilled", 64, False),
    ],
)
@pytest.mark.parametrize("place", ["diptych", "modelspec.architecture", "ss_base_model_version"])
def test_another_base_than_the_headers_is_told(stated, inputs, told, place):
    import json

    tensors, _ = entry("diffusers")
    header = {place: json.dumps({"base": stated}) if place == "diptych" else stated}
    module = nn.Module()
    module.x_embedder, module.transformer_blocks = nn.Linear(inputs, H), nn.ModuleList([nn.Module()])
    module.transformer_blocks[0].attn = nn.Module()
    module.transformer_blocks[0].attn.to_q = nn.Linear(H, H)
    report = str(apply_to_diffusers(module, parsed(tensors, **header)).report)
    assert ("trained on, this one is" in report) == told


@pytest.mark.parametrize(
    ("columns", "width", "result"),
    [
        (64, 384, 384),
        (64, 128, 128),
        (64, 64, 64),
        (128, 384, None),
        (384, 64, None),
        (128, 64, None),
        (100, 384, None),
    ],
)
def test_only_the_noise_latents_columns_are_padded(columns, width, result):
    module = LowRank(torch.ones(R, columns), torch.ones(H, R))
    if result is None:
        with pytest.raises(LoraError, match="this LoRA is for"):
            fit_module("x_embedder", module, H, width, [])
    else:
        assert fit_module("x_embedder", module, H, width, []).shape == (H, result)


@pytest.mark.parametrize(
    ("task", "inputs", "told"), [("kontext", 384, True), ("fill", 64, True), ("fill", 384, False)]
)
def test_our_own_files_say_their_base_by_their_task(task, inputs, told):
    header = json.dumps({"base": "models/my_model", "task": task})
    info = parsed(entry("diffusers")[0], diptych=header).info
    assert bool(base_notes(info, inputs)) == told and info.base == "models/my_model"


def test_the_command_line_says_what_a_lora_left_out(capsys):
    module = nn.Module()
    module.proj_out = nn.Linear(H, H)
    tensors = {**entry("diffusers")[0], "proj_out.lora_A.weight": torch.ones(R, H)}
    tensors |= {"proj_out.lora_B.weight": torch.ones(H, R), "text_encoder.x.lora_A.weight": torch.ones(1)}
    loras.apply(module, [(parsed(tensors), 1.0)])
    said = capsys.readouterr().err
    assert (
        f"skipped 1: {TO_Q}: this model has no such layer" in said and "use core's Load LoRA for CLIP" in said
    )


def test_a_vae_chosen_as_a_lora_is_told_apart_from_a_model():
    path = tiny.folder() / "fill" / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(LoraError, match="is a VAE, not a LoRA: load it with Load VAE"):
        apply_to_diffusers(nn.Module(), read(path))
    path = tiny.folder() / "fill" / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(LoraError, match="full fine-tuned model.*Load Diffusion Model"):
        apply_to_diffusers(nn.Module(), read(path))
