"""Recipes: typed, documented, and wrong ones refused with the remedy."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("transformers")
pytest.importorskip("yaml")
from comfyui_diptych.training import config
from comfyui_diptych.training.grpo_config import GRPOConfig


def test_every_option_is_documented():
    assert all(f.metadata.get("help") for f in dataclasses.fields(config.TrainConfig))
    assert "max_steps" in config.describe()


@pytest.mark.parametrize("path", sorted(config.RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_bundled_recipe_parses(path):
    values = config.read(path.stem)
    kind = GRPOConfig if "algorithm" in values else config.TrainConfig
    if values.get("task") in config.TASKS:
        assert config.from_dict(values, kind).recipe == path.stem


def test_icedit_recipe_is_the_papers():
    c = config.load("icedit")
    assert (c.rank, c.alpha, c.optimizer, c.lr, c.guidance, c.prompt_drop) == (
        32,
        32,
        "prodigy",
        1.0,
        1.0,
        0.1,
    )
    assert (c.loss_on, c.time_sampling, c.resolution, c.sizing) == ("all", "logit_normal", 512, "squash")
    assert config.load("icedit_moe").moe_experts == 4


def test_overrides_are_typed_like_the_file(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: icedit\nlr: 1e-4\ndata: [pairs:a, pairs:b]\n", encoding="utf-8")
    c = config.load(str(recipe), ["rank=8", "cache=false", "data=pairs:c", "mask_kinds=[full, half]"])
    assert (c.lr, c.rank, c.cache, c.data, c.mask_kinds) == (1e-4, 8, False, ["pairs:c"], ["full", "half"])
    assert c.recipe == "mine"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rnak": 4}, "did you mean 'rank'"),
        ({"rank": "many"}, "invalid int value"),
        ({"rank": 0}, "must be 1 or more"),
        ({"task": "upscale"}, "use one of fill"),
        ({"resolution": 500}, "multiple of 16, for example 496"),
        ({"init": "random"}, "an adapter needs pretrained weights"),
        ({"method": "moe_lora", "moe_top_k": 9}, "1..moe_experts"),
        ({"init_from": "somewhere"}, "init_from is for method full"),
        ({"init_lora": "a.safetensors", "method": "full"}, "merge the LoRA with fuse_loras"),
        ({"text_lengths": [64], "train_text_encoder": True, "method": "full"}, "for frozen T5 encoders"),
        ({"edit_loss_weight": 2.0, "task": "sd_inpaint"}, "edit_loss_weight is for fill and kontext"),
        ({"save_dtype": "float8"}, "save_dtype is 'float8': use one of float32"),
    ],
)
def test_mistakes_are_named_with_the_remedy(values, words):
    with pytest.raises(ValueError, match=words):
        config.from_dict(values)


def test_unknown_recipe_lists_the_bundled_ones():
    with pytest.raises(ValueError, match="icedit_moe"):
        config.load("nothing")


def test_a_bare_no_in_yaml_is_the_word(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("task: fill\nmixed_precision: no\n", encoding="utf-8")
    assert config.load(str(recipe)).mixed_precision == "no"
    assert config.load("icedit", ["mixed_precision=no"]).mixed_precision == "no"


def test_what_is_not_yaml_is_named_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"shapes:256\?task=inpaint\]': the value is not YAML; put quotes"):
        config.read("icedit", ["data=[shapes:256?task=inpaint]"])
    assert config.read("icedit", ['data=["shapes:256?task=inpaint"]'])["data"] == ["shapes:256?task=inpaint"]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("task: fill\ndata: [a: b: c]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="mine.yaml is not YAML in line 2"):
        config.read(str(recipe))
