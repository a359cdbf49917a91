"""Checkpoints are cut into glid's files and put together again without a change."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.models import checkpoints
from safetensors.torch import save_file

WHOLE = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "model.diffusion_model.out.2.bias": (4,),
    "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": (8,),
    "alphas_cumprod": (1000,),
}


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in WHOLE.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_split_and_merge_are_a_round_trip(state, suffix, tmp_path, capsys):
    path = tmp_path / f"sd{suffix}"
    checkpoints.write(path, state, wrapped=True)
    assert cli.main(["glid", "split", str(path), "-o", str(tmp_path / "parts")]) == 0
    model, kl = (
        torch.load(tmp_path / "parts" / name, weights_only=True) for name in ("diffusion.pt", "kl.pt")
    )
    assert model.keys() == {"input_blocks.0.0.weight", "out.2.bias"}
    assert kl.keys() == {"encoder.conv_in.weight", "quant_conv.weight"}
    merged = tmp_path / f"merged{suffix}"
    words = [str(path), str(tmp_path / "parts/diffusion.pt"), "-o", str(merged)]
    assert cli.main(["glid", "merge", *words]) == 0
    assert same(checkpoints.read(merged), state)
    assert "channels" not in capsys.readouterr().out


def test_a_trained_model_replaces_the_checkpoints_own_and_a_wider_one_is_said(state, tmp_path, capsys):
    checkpoints.write(tmp_path / "sd.ckpt", state, wrapped=True)
    model = {"input_blocks.0.0.weight": torch.ones(8, 8, 3, 3), "out.2.bias": torch.ones(4)}
    checkpoints.write(tmp_path / "inpaint.pt", model)
    out = tmp_path / "merged.pt"
    assert (
        cli.main(["glid", "merge", str(tmp_path / "sd.ckpt"), str(tmp_path / "inpaint.pt"), "-o", str(out)])
        == 0
    )
    merged = torch.load(out, weights_only=True)["state_dict"]
    prefixed = {f"model.diffusion_model.{name}": value for name, value in model.items()}
    assert same(merged, state | prefixed)
    assert "takes 8 channels" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["split", "{tmp}/none.ckpt"], "none.ckpt does not exist"),
        (["split", "{tmp}/kl_only.safetensors"], "has nothing under model.diffusion_model."),
        (["split", "{tmp}/broken.ckpt"], "cannot be read safely"),
        (["split", "{tmp}/pickle.ckpt"], "cannot be read safely"),
        (["split", "{tmp}/photo.png"], "has an unknown suffix"),
        (["merge", "{tmp}/sd.ckpt", "{tmp}/kl_only.safetensors", "-o", "{tmp}/m.pt"], "the model lacks"),
        (
            ["merge", "{tmp}/sd.ckpt", "{tmp}/sd.ckpt", "-o", "{tmp}/m.png"],
            "output {tmp}/m.png has an unknown",
        ),
    ],
)
def test_what_is_no_such_file_is_one_sentence(words, message, state, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints.write(tmp_path / "sd.ckpt", state, wrapped=True)
    save_file({"first_stage_model.a": torch.ones(1)}, tmp_path / "kl_only.safetensors")
    (tmp_path / "broken.ckpt").write_bytes(b"no model")
    (tmp_path / "photo.png").write_bytes(b"")
    torch.save({"state_dict": state, "callback": argparse_like()}, tmp_path / "pickle.ckpt")
    assert cli.main(["glid", *(word.format(tmp=tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in error and error.count("\n") == 1


def argparse_like():
    """An object that only an unsafe pickle reader would make, as trainers leave them in checkpoints."""
    import argparse

    return argparse.Namespace(a=1)
