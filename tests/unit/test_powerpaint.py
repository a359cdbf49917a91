"""PowerPaint's prompts word for word, and its task tokens as files that ComfyUI reads."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.models import powerpaint
from safetensors.torch import load_file, save_file

BAD = ", worst quality, low quality, normal quality, bad quality, blurry "
PROMPTS = {  # the table of PowerPaint's app for prompt "cat", negative "dog"
    "remove": (["empty scene blur cat P_ctxt"] * 2, ["dog P_obj"] * 2),
    "outpaint": (["empty scene blur cat P_ctxt"] * 2, ["dog P_obj"] * 2),
    "shape": (["cat P_shape", "cat P_ctxt"], [f"dog{BAD}P_shape", f"dog{BAD}P_ctxt"]),
    "text": (["cat P_obj"] * 2, [f"dog{BAD}P_obj"] * 2),
}
ENCODER = "text_model.embeddings.token_embedding."


@pytest.fixture
def encoder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{ENCODER}wrapped.weight": torch.randn(20, 8, generator=generator),
        "text_model.final_layer_norm.bias": torch.randn(8, generator=generator),
    }
    for token in powerpaint.TOKENS:
        state[f"{ENCODER}trainable_embeddings.{token}"] = torch.randn(10, 8, generator=generator)
    save_file(state, tmp_path / "text_encoder.safetensors")
    return tmp_path / "text_encoder.safetensors", state


@pytest.mark.parametrize("task", powerpaint.TASKS)
def test_prompts_are_those_of_the_app(task):
    positive, negative = powerpaint.prompts(task, "cat", "dog")
    assert (list(positive), list(negative)) == PROMPTS[task]
    in_comfyui, _ = powerpaint.prompts(task, "cat", "dog", "embedding:{}".format)
    assert [text.replace("embedding:", "") for text in in_comfyui] == list(positive)
    assert all(" embedding:P_" in text for text in in_comfyui)  # ComfyUI wants a space before it
    used = {
        token for texts in PROMPTS[task] for text in texts for token in powerpaint.TOKENS if token in text
    }
    assert set(powerpaint.used_tokens(task)) == used


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_split_writes_the_three_tokens_and_the_encoder_without_them(encoder, suffix, tmp_path, capsys):
    path, state = encoder
    if suffix == ".bin":
        torch.save(state, tmp_path / "encoder.pt")
        path = tmp_path / "encoder.pt"
    out, clip = tmp_path / "embeddings", tmp_path / "clip.safetensors"
    assert cli.main(["powerpaint", "split", str(path), "-o", str(out), "--clip", str(clip)]) == 0
    for token in powerpaint.TOKENS:
        made = load_file(out / f"{token}.safetensors")
        assert made.keys() == {"emb_params"}
        assert torch.equal(made["emb_params"], state[f"{ENCODER}trainable_embeddings.{token}"])
    plain = load_file(clip)
    assert plain.keys() == {f"{ENCODER}weight", "text_model.final_layer_norm.bias"}
    assert torch.equal(plain[f"{ENCODER}weight"], state[f"{ENCODER}wrapped.weight"])
    assert capsys.readouterr().out.count("wrote") == 4


def test_other_files_are_one_sentence(encoder, tmp_path, capsys):
    path, state = encoder
    save_file({f"{ENCODER}weight": torch.ones(3, 8)}, tmp_path / "clip_l.safetensors")
    state[f"{ENCODER}trainable_embeddings.P_obj"] = torch.ones(9, 8)
    save_file(state, tmp_path / "nine.safetensors")
    for file, message in (
        ("clip_l.safetensors", "has no trainable_embeddings.P_ctxt: give text_encoder.safetensors"),
        ("nine.safetensors", "P_obj has shape (9, 8) instead of [10, width]"),
        ("none.safetensors", "does not exist"),
    ):
        assert cli.main(["powerpaint", "split", str(tmp_path / file), "-o", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
