"""A file that cannot be used says why in one sentence, before anything else happens."""

from __future__ import annotations

import json
import os
import zipfile

import pytest
import torch
from comfyui_diptych.models.lora import LoraError, containers, read
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


def packed_torch_file(folder):
    """A zip bomb: torch.save's own file, its zeros packed to a thousandth."""
    torch.save(plain(**{f"{KEY}.lora_A.weight": torch.zeros(2, 4_000_000)}), folder / "plain.pt")
    with (
        zipfile.ZipFile(folder / "plain.pt") as source,
        zipfile.ZipFile(folder / "lora.pt", "w", 8) as packed,
    ):
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    assert (folder / "lora.pt").stat().st_size < 100_000
    return folder / "lora.pt"


def expanded_view(folder):
    torch.save(plain(**{f"{KEY}.lora_A.weight": torch.ones(1).expand(2, 10**9)}), folder / "lora.pt")
    return folder / "lora.pt"


def old_torch_file(folder):
    torch.save(plain(), folder / "lora.pt", _use_new_zipfile_serialization=False)
    return folder / "lora.pt"


def torch_file_in_disguise(folder):
    torch.save(plain(), folder / "plain.pt")
    return (folder / "plain.pt").rename(folder / "lora.safetensors")


def names_that_are_no_text(folder):
    torch.save({1: A, ("a", 2): B}, folder / "lora.pt")
    return folder / "lora.pt"


def contains_itself(folder):
    loop = {"note": "no tensors at all"}
    loop["state_dict"] = loop
    torch.save(loop, folder / "lora.pt")
    return folder / "lora.pt"


def a_pipe(folder):
    os.mkfifo(folder / "lora.safetensors")
    return folder / "lora.safetensors"


def a_name_too_long(folder):
    return folder / ("x" * 5000)


def control_characters(folder):
    return saved(folder, {"\x1b[31mred\n.weight": A})


def rank_zero(folder):
    return saved(folder, plain(**{f"{KEY}.lora_A.weight": A[:0], f"{KEY}.lora_B.weight": B[:, :0]}))


def vector_alpha(folder):
    return saved(folder, plain(**{f"{KEY}.alpha": torch.ones(2)}))


def integers(folder):
    return saved(folder, plain(**{f"{KEY}.lora_B.weight": torch.ones(4, 2, dtype=torch.int8)}))


def unequal_loha(folder):
    shapes = {"w1_a": (4, 2), "w1_b": (2, 6), "w2_a": (4, 3), "w2_b": (2, 6)}
    return saved(folder, {f"{KEY}.hada_{n}": torch.ones(s) for n, s in shapes.items()})


def kronecker_of_vectors(folder):
    return saved(folder, {f"{KEY}.lokr_w1": torch.ones(4), f"{KEY}.lokr_w2": torch.ones(3, 5)})


def moe(folder, header=None, **changes):
    tensors = {f"{KEY}.lora_{ab}.expert_{i}.weight": t for ab, t in (("A", A), ("B", B)) for i in (0, 1)}
    tensors |= {f"{KEY}.lora_route.weight": torch.ones(2, 4), **changes}
    return saved(folder, tensors, header and {"diptych": json.dumps(header)})


def foreign_gate(folder):
    return moe(folder, {"moe_gate": "sparsemax"})


def top_k_that_is_no_number(folder):
    return moe(folder, {"moe_top_k": "abc"})


def experts_of_other_shapes(folder):
    return moe(folder, **{f"{KEY}.lora_A.expert_1.weight": torch.ones(3, 4)})


def index_of_files_elsewhere(folder):
    name = "diffusion_pytorch_model.safetensors.index.json"
    (folder / name).write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    return folder


def deep_config(folder):
    (folder / "adapter_config.json").write_text("[" * 100_000)
    return saved(folder, plain(), name="adapter_model.safetensors")


def without_b(folder):
    return saved(folder, {f"{KEY}.lora_A.weight": A})


def ranks_apart(folder):
    return saved(folder, plain(**{f"{KEY}.lora_B.weight": torch.ones(4, 3)}))


def nunchaku(folder):
    return saved(folder, {"transformer_blocks.0.qkv_proj.lora_down": A, "transformer_blocks.0.smooth": B})


def dora_without_its_magnitudes(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "use_dora": True}))
    return saved(folder, plain(), name="adapter_model.safetensors")


def factors_of_the_base_itself(folder):
    config = {"r": 2, "lora_alpha": 2, "init_lora_weights": "pissa_niter_16"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return saved(folder, plain(), name="adapter_model.safetensors")


def dora_of_another_size(folder):
    return saved(folder, plain(**{f"{KEY}.lora_magnitude_vector": torch.ones(5)}))


def broken_config(folder):
    (folder / "adapter_config.json").write_text("{")
    return saved(folder, plain(), name="adapter_model.safetensors")


def adalora(folder):
    """Its A and B alone would be another change than A, E and B."""
    return saved(folder, plain(**{f"{KEY}.lora_E": torch.ones(2, 1)}))


def old_oft(folder):
    return saved(folder, {f"base_model.model.{KEY}.oft_r": A})


def oft_without_blocks(folder):
    return saved(folder, {"lora_unet_double_blocks_0_img_attn_proj.oft_blocks": A})


def no_lora(folder):
    return saved(folder, {"some.vae.weight": A})


def text_encoder_only(folder):
    return saved(folder, {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": A})


def text_encoder_itself(folder):
    return saved(folder, {"text_model.encoder.layers.0.mlp.fc1.weight": A})


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
    pickled_code: "damaged, incomplete or not a weights file.*Python objects, which are never run",
    packed_torch_file: "compressed, which torch never does",
    expanded_view: "claims more elements than the file holds",
    old_torch_file: "before 2020.*as .safetensors",
    torch_file_in_disguise: "rename it to lora.pt",
    names_that_are_no_text: "name is int, not text",
    contains_itself: "no named tensors",
    a_pipe: "no regular file",
    a_name_too_long: "does not exist",
    control_characters: r"\?\[31mred\?.weight",
    rank_zero: r"lora_A of shape|A of shape \[0, 4\]",
    vector_alpha: "not one finite number",
    integers: "int8.*quantised",
    unequal_loha: "loha factors that do not fit",
    kronecker_of_vectors: r"lokr_w1 of shape \[4\]",
    foreign_gate: "gate 'sparsemax'",
    top_k_that_is_no_number: "moe_top_k .* 'abc'",
    experts_of_other_shapes: "different shapes",
    index_of_files_elsewhere: "names no weights files beside it",
    deep_config: "not readable JSON",
    without_b: "lora_A but no lora_B",
    ranks_apart: "ranks do not meet",
    nunchaku: "quantised",
    dora_without_its_magnitudes: "use_dora",
    dora_of_another_size: "DoRA scale",
    factors_of_the_base_itself: "path_initial_model_for_weight_conversion",
    broken_config: "not readable JSON",
    old_oft: "adapter kind",
    adalora: "lora_E, an adapter kind",
    oft_without_blocks: "oft_blocks of shape",
    no_lora: "holds no LoRA",
    text_encoder_only: "text encoder weights only",
    text_encoder_itself: "is a text encoder.*Load CLIP",
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


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_more_tensors_than_any_lora_has_are_refused(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "_MOST_TENSORS", 9)
    tensors = {str(i): torch.ones(1) for i in range(10)}
    (save_file if suffix == ".safetensors" else torch.save)(tensors, tmp_path / f"lora{suffix}")
    with pytest.raises(LoraError, match="10 tensors are no LoRA's, at most 9"):
        read(tmp_path / f"lora{suffix}")
