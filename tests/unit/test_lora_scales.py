"""Where the strength of a LoRA is found, and whose word it is not: a neighbour's file, half a name's."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from comfyui_diptych.models.lora import LoraError, read
from comfyui_diptych.models.lora.files import RawFile
from comfyui_diptych.models.lora.patterns import Patterns
from comfyui_diptych.models.lora.read import canonical
from safetensors.torch import save_file

R, H = 4, 8
TO_Q, OUT = "transformer_blocks.0.attn.to_q", "proj_out"
A, B = torch.ones(R, H), torch.ones(H, R)


def pair(layer, prefix="transformer."):
    return {f"{prefix}{layer}.lora_A.weight": A.clone(), f"{prefix}{layer}.lora_B.weight": B.clone()}


def scale_of(path_or_tensors, layer=TO_Q, header=None):
    if isinstance(path_or_tensors, dict):
        weights = canonical(RawFile(path=Path("x.safetensors"), tensors=path_or_tensors, header=header or {}))
    else:
        weights = read(path_or_tensors)
    return weights.modules[layer].scale


@pytest.mark.parametrize(
    "header",
    [
        {"lora_alpha": "8"},
        {"alpha": "8.0"},
        {"network_alpha": "8"},
        {"ss_network_alpha": "8"},
        {"transformer.lora_alpha": "8", "transformer.r": "4"},
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 3})},
        {"lora_adapter_metadata": json.dumps({"lora_alpha": 8})},
        {"ot_config": json.dumps({"lora_alpha": 8.0, "lora_rank": 4})},
        {"adapter_config": json.dumps({"lora_alpha": 8, "r": 4})},
    ],
    ids=lambda header: next(iter(header)),
)
def test_alpha_in_the_header_under_any_name(header, tmp_path):
    save_file(pair(TO_Q), tmp_path / "x.safetensors", metadata=header)
    assert scale_of(tmp_path / "x.safetensors") == 2


@pytest.mark.parametrize("header", [{"lora_alpha": "8"}, {"network_alpha": "8"}])
def test_rank_stabilised_in_the_header(header):
    assert scale_of(pair(TO_Q), header={**header, "use_rslora": "True"}) == 8 / math.sqrt(R)


@pytest.mark.parametrize(
    "alpha", [torch.tensor(8.0), torch.tensor([8.0]), torch.tensor(8.0).bfloat16(), torch.tensor(8)]
)
def test_alpha_tensors_of_any_make(alpha):
    assert scale_of({**pair(TO_Q), f"transformer.{TO_Q}.alpha": alpha}) == 2


def test_a_scale_tensor_is_the_scale_itself():
    module = canonical(
        RawFile(Path("x"), {**pair(TO_Q), f"transformer.{TO_Q}.scale": torch.tensor(0.3)}, {})
    ).modules
    assert module[TO_Q].scale == pytest.approx(0.3) and module[TO_Q].scale_from == ".scale in the file"


def test_an_alpha_under_another_naming_than_its_factors_is_theirs():
    tensors = {
        **pair(TO_Q, "base_model.model."),
        f"lora_transformer_{TO_Q.replace('.', '_')}.alpha": torch.tensor(8.0),
    }
    assert scale_of(tensors) == 2


@pytest.mark.parametrize("name", ["style.json", "my.style.v2.json"])
def test_a_json_file_of_the_weights_own_name_is_theirs(name, tmp_path):
    path = tmp_path / name.replace(".json", ".safetensors")
    save_file(pair(TO_Q), path)
    (tmp_path / name).write_text(json.dumps({"lora_alpha": 8, "r": R}))
    assert scale_of(path) == 2


@pytest.mark.parametrize("text", ['{"description": "a style", "preferred weight": 0.7}', "no json", "[1]"])
def test_a_json_file_of_another_program_says_nothing(text, tmp_path):
    save_file(pair(TO_Q), tmp_path / "x.safetensors")
    (tmp_path / "x.json").write_text(text)
    assert scale_of(tmp_path / "x.safetensors") == 1


@pytest.mark.parametrize("weights", ["other.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_neighbours_adapter_config_says_nothing(weights, tmp_path):
    save_file(pair(TO_Q), tmp_path / weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": R, "lora_alpha": 64, "use_dora": True}))
    assert scale_of(tmp_path / weights) == 1


def test_a_config_of_another_rank_is_not_used_and_said(tmp_path):
    save_file(pair(TO_Q), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 64}))
    weights = read(tmp_path)
    assert weights.modules[TO_Q].scale == 1 and any("rank 16" in note for note in weights.notes)


def test_an_alpha_pattern_does_not_mean_the_tail_of_half_a_name():
    """peft: a whole name, or its tail after a dot; `^` only the whole name."""
    block = f"single_transformer_blocks.0.{OUT}"
    tensors = {**pair(OUT), **pair(block)}
    for pattern, wanted in ((OUT, (3, 3)), (f"^{OUT}", (3, 1)), ("oj_out", (1, 1)), (block, (1, 3))):
        fields = {"transformer.lora_alpha": R, "transformer.alpha_pattern": {pattern: 3 * R}}
        header = {"lora_adapter_metadata": json.dumps(fields)}
        assert (scale_of(tensors, OUT, header), scale_of(tensors, block, header)) == wanted, pattern


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (r"attn\.to_[qkv]", ["a.attn.to_q", "attn.to_v"], ["attn.to_out", "xattn.to_q"]),
        (r"blocks\.\d+\.ff", ["blocks.12.ff", "x.blocks.0.ff"], ["blocks.x.ff", "blocks..ff"]),
        (r".*to_(q|k)", ["a.b.to_q", "to_k"], ["to_v"]),
        (r"^a\.b$", ["a.b"], ["x.a.b"]),
        (r"ab?c+", ["ac", "abccc", "x.abc"], ["ab", "abbc"]),
        (r"[a-c]x", ["ax", "cx"], ["dx"]),
    ],
)
def test_patterns_match_as_in_peft(pattern, yes, no):
    patterns = Patterns({pattern: 7.0}, "test")
    for name in yes + no:
        assert (patterns.value(name) == 7.0) == (name in yes)
        assert bool(re.match(rf"(.*\.)?({pattern})$", name)) == (name in yes)


def test_the_first_pattern_that_matches_wins():
    assert Patterns({"to_q": 1.0, r".*": 2.0}, "t").value("a.to_q") == 1.0
    assert Patterns({r".*": 2.0, "to_q": 1.0}, "t").value("a.to_q") == 2.0


@pytest.mark.parametrize("pattern", ["((a+)+)+Q", "(a|a)*b", "a{2,9}", "[^a]", "(", "a+" * 300, r"(?=x)"])
def test_a_pattern_that_could_hang_is_refused(pattern):
    with pytest.raises(LoraError, match="write the names out|remove them"):
        Patterns({pattern: 1.0}, "alpha_pattern")


def test_a_long_pattern_takes_no_longer_for_a_long_name():
    assert Patterns({".*" * 200 + "Q": 1.0}, "t").value("a." * 100) is None


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["tensor", "header", "config"])
def test_an_alpha_that_is_no_number_is_refused(number, place, tmp_path):
    tensors, header = pair(TO_Q, "base_model.model."), None
    if place == "tensor":
        tensors[f"base_model.model.{TO_Q}.alpha"] = torch.tensor(number)
    elif place == "header":
        header = {"lora_alpha": str(number)}
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": R, "lora_alpha": number}))
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata=header)
    with pytest.raises(LoraError, match="finite number"):
        read(tmp_path)
