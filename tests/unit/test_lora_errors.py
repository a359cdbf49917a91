"""A file that cannot be used says why in one sentence, before anything else happens."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_diptych.models.lora import LoraError, read
from safetensors.torch import save_file

A, B = torch.ones(2, 4), torch.ones(4, 2)
KEY = "transformer.transformer_blocks.0.attn.to_q"


def saved(folder, tensors, header=None, name="lora.safetensors"):
    save_file({k: t.clone() for k, t in tensors.items()}, folder / name, metadata=header)
    return folder / name


def plain(**changes):
    return {f"{KEY}.lora_A.weight": A.clone(), f"{KEY}.lora_B.weight": B.clone(), **changes}


def truncated(folder):
    path = saved(folder, plain())
    path.write_bytes(path.read_bytes()[:-10])
    return path


def garbage(folder):
    (folder / "lora.safetensors").write_bytes(b"\x00\x01not weights" * 9)
    return folder / "lora.safetensors"


def web_page(folder):
    (folder / "lora.safetensors").write_bytes(b"<!DOCTYPE html><html>404</html>")
    return folder / "lora.safetensors"


def lfs_pointer(folder):
    (folder / "lora.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    return folder / "lora.safetensors"


def empty(folder):
    (folder / "lora.safetensors").write_bytes(b"")
    return folder / "lora.safetensors"


def nan(folder):
    tensors = plain()
    tensors[f"{KEY}.lora_B.weight"][3, 1] = float("nan")
    return saved(folder, tensors)


def infinite(folder):
    tensors = {k: t.bfloat16() for k, t in plain().items()}
    tensors[f"{KEY}.lora_A.weight"][1, 2] = float("inf")
    return saved(folder, tensors)


def pickled_code(folder):
    class Payload:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"a": Payload()}, folder / "lora.pt")
    return folder / "lora.pt"


def without_b(folder):
    return saved(folder, {f"{KEY}.lora_A.weight": A})


def ranks_apart(folder):
    return saved(folder, plain(**{f"{KEY}.lora_B.weight": torch.ones(4, 3)}))


def nunchaku(folder):
    return saved(folder, {"transformer_blocks.0.qkv_proj.lora_down": A, "transformer_blocks.0.smooth": B})


def dora_without_its_magnitudes(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "use_dora": True}))
    return saved(folder, plain(), name="adapter_model.safetensors")


def dora_of_another_size(folder):
    return saved(folder, plain(**{f"{KEY}.lora_magnitude_vector": torch.ones(5)}))


def broken_config(folder):
    (folder / "adapter_config.json").write_text("{")
    return saved(folder, plain(), name="adapter_model.safetensors")


def old_oft(folder):
    return saved(folder, {f"base_model.model.{KEY}.oft_r": A})


def oft_without_blocks(folder):
    return saved(folder, {"lora_unet_double_blocks_0_img_attn_proj.oft_blocks": A})


def no_lora(folder):
    return saved(folder, {"some.vae.weight": A})


def text_encoder_only(folder):
    return saved(folder, {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": A})


def two_adapters(folder):
    return saved(folder, {f"{KEY}.lora_{ab}.{n}.weight": t for ab, t in (("A", A), ("B", B)) for n in "xy"})


def experts_without_router(folder):
    return saved(folder, {f"{KEY}.lora_{ab}.expert_0.weight": t for ab, t in (("A", A), ("B", B))})


def missing_expert(folder):
    tensors = {f"{KEY}.lora_{ab}.expert_{i}.weight": t for ab, t in (("A", A), ("B", B)) for i in (0, 2)}
    return saved(folder, tensors | {f"{KEY}.lora_route.weight": torch.ones(2, 4)})


def empty_folder(folder):
    return folder


def two_files(folder):
    saved(folder, plain(), name="a.safetensors")
    saved(folder, plain(), name="b.safetensors")
    return folder


def missing(folder):
    return folder / "nothing.safetensors"


CASES = {
    truncated: "damaged, incomplete",
    garbage: "damaged, incomplete",
    web_page: "web page",
    lfs_pointer: "Git LFS pointer",
    empty: "damaged, incomplete",
    nan: "NaN or infinite.*lora_?B|NaN or infinite.*B: 1 of 8",
    infinite: "NaN or infinite.*1 of 8",
    pickled_code: "damaged, incomplete or not a weights file",
    without_b: "lora_A but no lora_B",
    ranks_apart: "ranks do not meet",
    nunchaku: "quantised",
    dora_without_its_magnitudes: "use_dora",
    dora_of_another_size: "DoRA scale",
    broken_config: "not readable JSON",
    old_oft: "adapter kind",
    oft_without_blocks: "oft_blocks of shape",
    no_lora: "holds no LoRA",
    text_encoder_only: "text encoder weights only",
    two_adapters: "several adapters",
    experts_without_router: "no lora_route",
    missing_expert: "incomplete",
    empty_folder: "are: none",
    two_files: "a.safetensors, b.safetensors",
    missing: "does not exist",
}


@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__)
def test_unusable_files_raise_one_clear_sentence(make, tmp_path, capsys):
    path = make(tmp_path)
    with pytest.raises(LoraError, match=CASES[make]) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out


def test_top_k_beyond_the_experts_is_refused(tmp_path):
    tensors = {f"{KEY}.lora_{ab}.expert_{i}.weight": t for ab, t in (("A", A), ("B", B)) for i in (0, 1)}
    path = saved(tmp_path, {**tensors, f"{KEY}.lora_route.weight": torch.ones(2, 4)})
    with pytest.raises(LoraError, match="top_k is 3 .* 2 experts"):
        read(path, top_k=3)
