"""The loader node without ComfyUI: it lists what there is, finds folders by their files, refuses clearly."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfyui_diptych.models.lora import read
from comfyui_diptych.nodes import lora as node
from comfyui_diptych.nodes import menus
from safetensors.torch import save_file

FILES = ["style.safetensors", "grpo/checkpoint-3/adapter_model.safetensors", "a/b.safetensors"]


@pytest.fixture
def loras(tmp_path, monkeypatch):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = SimpleNamespace(
        get_filename_list=lambda kind: FILES,
        get_full_path=lambda kind, name: str(tmp_path / name) if (tmp_path / name).is_file() else None,
    )
    monkeypatch.setitem(sys.modules, "folder_paths", found)
    return tmp_path


def test_lists_without_comfyui():
    assert isinstance(node.DiptychGRPOLoraLoader.INPUT_TYPES()["required"]["lora"][0], list)


def test_a_folder_with_a_trainers_file_in_it_is_listed_as_one_lora(loras):
    names = menus.lora_names()
    assert "grpo/checkpoint-3/" in names and "a/" not in names and set(FILES) <= set(names)
    assert menus.lora_path("grpo/checkpoint-3/") == loras / "grpo" / "checkpoint-3"
    assert menus.lora_path("style.safetensors") == loras / "style.safetensors"


def test_windows_separators_lead_to_the_same_folder(loras):
    assert list(menus._lora_folders(["x\\y\\adapter_model.safetensors"])) == ["x/y/"]


def test_a_changed_config_beside_the_weights_changes_the_cache_key(loras):
    key = node.DiptychGRPOLoraLoader.IS_CHANGED
    before = key(lora="grpo/checkpoint-3/")
    assert key(lora="grpo/checkpoint-3/") == before
    (loras / "grpo/checkpoint-3/adapter_config.json").write_text("{}")
    assert key(lora="grpo/checkpoint-3/") != before


def test_a_missing_file_is_named(loras):
    assert "gone.safetensors" in node.DiptychGRPOLoraLoader.VALIDATE_INPUTS("gone.safetensors")
    with pytest.raises(ValueError, match="gone.safetensors"):
        node.DiptychGRPOLoraLoader().load(None, "gone.safetensors", 1.0)


@pytest.mark.parametrize(
    "stored, expected",
    [
        ([[1, 0.25], [2, 0.5]], ((1, 0.25), (2, 0.5))),
        (None, ()),
        ("rising", ()),
        ([[1, "high"], [3], [2, 0.5]], ((2, 0.5),)),
    ],
)
def test_the_reward_curve_of_a_file_is_drawn(tmp_path, stored, expected):
    tensors = {
        f"transformer.transformer_blocks.0.attn.to_q.lora_{ab}.weight": torch.ones(4, 4) for ab in "AB"
    }
    header = {"reward": "shapes x 1", "algorithm": "grpo"} | ({} if stored is None else {"curve": stored})
    save_file(tensors, tmp_path / "x.safetensors", {"diptych": json.dumps(header)})
    info = read(tmp_path / "x.safetensors").info
    assert info.curve == expected
    drawn, empty = node._reward_curve(info), node._reward_curve(replace(info, curve=()))
    assert drawn.shape == empty.shape and drawn.shape[-1] == 3
    assert torch.equal(drawn, empty) != bool(expected)
