"""Recipes: typed, documented, and wrong ones refused with the remedy."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("yaml")
from comfyui_diptych import cli
from comfyui_diptych.commands.train import WORLD_TASKS
from comfyui_diptych.training import config, recipes
from comfyui_diptych.training.multimodal.options import MultimodalOptions
from comfyui_diptych.training.reinforce.config import GRPOConfig, TinyGRPOConfig
from comfyui_diptych.training.runtime import options
from comfyui_diptych.training.tasks import families
from comfyui_diptych.training.tiny.options import TinyOptions


def test_every_option_is_documented():
    for kind in (config.TinyTrainConfig, config.MultimodalTrainConfig, TinyGRPOConfig):
        for field in dataclasses.fields(kind):
            assert field.metadata["help"].endswith(".") and field.metadata["group"], field.name


@pytest.mark.parametrize(("command", "kind"), [("train", config.TrainConfig), ("grpo", GRPOConfig)])
def test_help_lists_the_recipes_and_all_options_in_groups_the_five_that_matter_first(command, kind, capsys):
    for flag in ("--help", "--help-config"):
        with pytest.raises(SystemExit) as left:
            cli.main([command, flag])
        assert left.value.code == 0
    text = capsys.readouterr().out
    named = re.findall(r"^  (\w+) =(?: |$)", text, re.MULTILINE)
    named = named[: len(named) // 2]  # of one of the two
    assert tuple(named[:5]) == kind.essentials and "The 5 that matter most:" in text
    assert sorted([*named, *kind.unused]) == sorted(f.name for f in dataclasses.fields(kind))
    groups = {f.metadata["group"] for f in dataclasses.fields(kind) if f.name not in kind.unused}
    assert all(f"\n{title}:\n" in text for title in groups)
    for path in recipes.RECIPES.glob("*.yaml"):
        of_reward = path.stem.startswith("grpo_")
        assert (of_reward == (command == "grpo")) == (f"\n  {path.stem} " in text)
    assert all(len(line) <= 112 for line in text.splitlines())


def test_the_docs_list_the_options_of_the_tiny_models():
    text = (recipes.RECIPES.parents[1] / "docs" / "tiny-models.md").read_text(encoding="utf-8")
    assert options.table(TinyOptions) in text, f"write this there:\n{options.table(TinyOptions)}"


def test_the_docs_list_the_options_of_the_multimodal_model():
    text = (recipes.RECIPES.parents[1] / "docs" / "multimodal.md").read_text(encoding="utf-8")
    assert options.table(MultimodalOptions) in text, f"write this there:\n{options.table(MultimodalOptions)}"


def test_every_bundled_recipe_says_in_one_line_what_it_is():
    summaries = recipes.summaries()
    assert len(summaries) == len(list(recipes.RECIPES.glob("*.yaml")))
    assert all(20 < len(text) < 120 for text in summaries.values())


def test_the_help_of_trainings_loads_no_heavy_library():
    code = "import sys; from comfyui_diptych import cli\ntry: cli.main(['grpo', '--help'])\nfinally: "
    code += "assert not {'transformers', 'diffusers', 'peft', 'yaml'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "nft_beta" in done.stdout, done.stderr


def test_options_of_the_tiny_models_come_with_a_recipe_that_sets_one():
    assert type(recipes.load("icedit")) is config.TrainConfig
    c = recipes.load("icedit", ["text_lengths=[64]"])
    assert type(c) is config.TinyTrainConfig and c.text_lengths == [64] and c.init == "pretrained"
    assert type(recipes.from_dict({"noise_offset": 0.1}, GRPOConfig)) is TinyGRPOConfig
    plain, tiny = config.TrainConfig(), config.TinyTrainConfig()
    assert tiny.neutral() == {name: getattr(tiny, name) for name in plain.neutral()}
    assert {f.name for f in dataclasses.fields(TinyOptions)} == plain.neutral().keys()
    with pytest.raises(ValueError, match="did you mean 'noise_offset'"):
        recipes.from_dict({"noise_offest": 1})


@pytest.mark.parametrize("path", sorted(recipes.RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_bundled_recipe_parses(path):
    values = recipes.read(path.stem)
    kind = GRPOConfig if "algorithm" in values else config.TrainConfig
    task = values.get("task")
    if task in WORLD_TASKS:
        module, name = WORLD_TASKS[values.pop("task")]
        module = importlib.import_module(f"comfyui_diptych.training.{module}")
        assert recipes.from_dict(values, getattr(module, name)).output_dir
    elif task in config.TASKS:
        assert recipes.from_dict(values, kind).recipe == path.stem


@pytest.mark.parametrize("path", sorted(recipes.RECIPES.glob("grpo_tiny_*.yaml")), ids=lambda p: p.stem)
def test_recipes_of_the_bundled_models_find_them_from_any_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = recipes.from_dict(recipes.read(path.stem), GRPOConfig)
    assert (Path(made.model) / "model_index.json").is_file()
    assert all(Path(name).is_file() for name in [made.init_lora, *made.fuse_loras] if name)
    fused = recipes.from_dict({"fuse_loras": ["tiny:loras/icedit.safetensors:0.5"]}).fuse_loras[0]
    assert fused.endswith("loras/icedit.safetensors:0.5") and Path(fused.rpartition(":")[0]).is_file()


def test_every_task_has_its_family():
    assert config.TASKS == tuple(families.FAMILIES)


def test_icedit_recipe_is_the_papers():
    c = recipes.load("icedit")
    assert (c.rank, c.alpha, c.optimizer, c.lr, c.guidance, c.prompt_drop) == (
        32,
        32,
        "prodigy",
        1.0,
        1.0,
        0.1,
    )
    assert (c.loss_on, c.time_sampling, c.resolution, c.sizing) == ("all", "logit_normal", 512, "squash")
    assert recipes.load("icedit_moe").moe_experts == 4


def test_overrides_are_typed_like_the_file(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: icedit\nlr: 1e-4\ndata: [pairs:a, pairs:b]\n", encoding="utf-8")
    c = recipes.load(str(recipe), ["rank=8", "cache=false", "data=pairs:c", "mask_kinds=[full, half]"])
    assert (c.lr, c.rank, c.cache, c.data, c.mask_kinds) == (1e-4, 8, False, ["pairs:c"], ["full", "half"])
    assert c.recipe == "mine"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rnak": 4}, "did you mean 'rank'"),
        ({"rank": "many"}, "rank is 'many': give a whole number"),
        ({"rank": 0}, "must be 1 or more"),
        ({"task": "upscale"}, "use one of fill"),
        ({"resolution": 500}, "multiple of 16, for example 496"),
        ({"init": "random"}, "an adapter needs pretrained weights"),
        ({"method": "moe_lora", "moe_top_k": 9}, "1..moe_experts"),
        ({"init_from": "somewhere"}, "init_from is for method full"),
        ({"init_lora": "a.safetensors", "method": "full"}, "merge the LoRA with fuse_loras"),
        ({"text_lengths": [64], "train_text_encoder": True, "method": "full"}, "for frozen T5 encoders"),
        ({"edit_loss_weight": 2.0, "task": "sd_inpaint"}, "edit_loss_weight is for fill and kontext"),
        (
            {"time_sampling": "mode"},
            "time_sampling is 'mode': use one of logit_normal, logit_normal:MEAN,STD",
        ),
        ({"time_sampling": "logit_normal:1"}, "use one of logit_normal"),
        ({"time_sampling": "logit_normal:0,-1"}, "STD is a finite number, 0 or more"),
        ({"class_images": "my_class"}, "write FOLDER.prompt=WORDS or"),
        ({"class_images": "my_class?prompt=a dog&count=0"}, "count is 1 or more"),
        ({"loss_on": "weighted"}, "for example weighted:4"),
        ({"loss_on": "weighted:-4"}, "WEIGHT is a finite number, 0 or more"),
        ({"save_dtype": "float8"}, "save_dtype is 'float8': use one of float32"),
        ({"lr": "nan"}, "lr is nan: give a finite number"),
        ({"lr": float("inf")}, "lr is inf: give a finite number"),
        ({"guidance": "-inf"}, "guidance is -inf: give a finite number"),
        ({"lr": -1.0}, "lr is -1.0: it must be 0 or more"),
        ({"threads": -1}, "threads is -1: it must be 0 or more"),
        ({"sample_every": -5}, "sample_every is -5: it must be 0 or more"),
        ({"seed": 10**22}, "seed is 10000000000000000000000: it must be at most 4294967295"),
        ({"resolution": 1_600_000}, "resolution is 1600000: it must be at most 16384"),
        ({"prompt_drop": 1.5}, "prompt_drop is 1.5: it must be at most 1"),
        ({"model": ["a", "b"]}, "model is .'a', 'b'.: it takes one value"),
        ({"rank": {"a": 1}}, "rank is {'a': 1}: it takes one value"),
        ({"data": [["a"]]}, "data is .*: it takes a list of values"),
        ({"target_modules": ["("]}, "target_modules has '.', no regular expression"),
        ({"output_name": "x" * 300}, "output_name has 300 bytes: use at most 200"),
        ({"output_name": "a/b"}, "output_name is 'a/b': use a plain file name"),
    ],
)
def test_mistakes_are_named_with_the_remedy(values, words):
    with pytest.raises(ValueError, match=words):
        recipes.from_dict(values)


@pytest.mark.parametrize("kind", [config.TrainConfig, GRPOConfig])
def test_an_option_that_is_gone_says_what_to_do_instead(kind):
    assert config.TrainConfig.gone.items() <= GRPOConfig.gone.items()
    assert not kind.gone.keys() & {f.name for f in dataclasses.fields(kind)}
    known = {f.name for f in dataclasses.fields(TinyGRPOConfig)} | {"logit_normal"}
    for name, remedy in kind.gone.items():
        assert set(re.findall(r"[a-z]+(?:_[a-z]+)+", remedy)) <= known, name
        with pytest.raises(ValueError, match=f"option {name} is gone: {re.escape(remedy)}"):
            recipes.from_dict({name: 1}, kind)


def test_options_of_several_values_are_read_in_one_way():
    assert config.TrainConfig().sigmas == ("logit_normal", 0.0, 1.0)
    c = recipes.from_dict({"time_sampling": "logit_normal: 1.5, 1e-1", "loss_on": "weighted:4"})
    assert c.sigmas == ("logit_normal", 1.5, 0.1) and c.regions == ("weighted", 4.0)
    c = recipes.from_dict({"time_sampling": "uniform", "loss_on": "edited"})
    assert (c.sigmas.kind, c.regions.kind, c.prior) == ("uniform", "edited", None)
    c = recipes.from_dict({"class_images": "a@b/c?prompt=what? a dog & cat@2&count=7@0.5"})
    assert c.prior == ("a@b/c", "what? a dog & cat@2", 7, 0.5)
    assert recipes.load("sd_inpaint_dreambooth").prior == (
        "output/dreambooth/class",
        "a photo of a dog",
        100,
        1,
    )


def test_options_of_several_values_of_reward_training():
    assert GRPOConfig().windows == ("random", 2, 10, 0, 5, 25, 0)
    c = recipes.from_dict({"window": "progressive:1-9/30", "data_rows": "4@0.1"}, GRPOConfig)
    assert c.windows[3:6] == (1, 9, 30) and c.windows.span == (1, 9)
    assert c.supervised == (4, 0.1) and c.needs_targets and not GRPOConfig().needs_targets
    c = recipes.from_dict({"window": "fixed:3", "data_rows": 2}, GRPOConfig)
    assert c.windows.span == c.windows.at(7) == (3, 5) and c.supervised == (2, 1.0)
    values = {"algorithm": "nft", "contrastive_states": "2@3", "eta": None}
    c = recipes.from_dict(values, GRPOConfig)
    assert c.contrastive == (2, 3.0) and c.eta is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kl_beta": "nan"}, "kl_beta is nan"),
        ({"clip": -1.0}, "clip is -1.0: it must be 0 or more"),
        ({"rollout_steps": 10**9}, "rollout_steps is 1000000000: it must be at most 10000"),
        ({"eta": -1.0}, "eta is -1: it must be 0 or more; leave it empty"),
        ({"window": "random:3"}, "window is 'random:3': use one of fixed:FIRST, random, random:FIRST-LAST"),
        ({"window": "random:0-4/5"}, "/EVERY is for progressive"),
        ({"window": "random:0-11"}, "does not fit into steps 0 to 11 of 10"),
        ({"data_rows": "some"}, "data_rows is 'some': write COUNT or COUNT@WEIGHT"),
        ({"contrastive_states": "2@inf"}, "write COUNT or COUNT@WEIGHT"),
        ({"contrastive_states": 2}, "contrastive_states is for algorithm nft"),
        ({"eval_rows": -1}, "eval_rows is -1: it must be 0 or more"),
    ],
)
def test_numbers_of_reward_training_are_held_to_their_ranges_too(values, words):
    with pytest.raises(ValueError, match=words):
        recipes.from_dict(values, GRPOConfig)


def test_numbers_with_a_range_exist_and_are_numbers():
    for field in dataclasses.fields(TinyGRPOConfig):
        if field.metadata["low"] is not None or field.metadata["high"] is not None:
            assert isinstance(field.default, (int, float)) or field.name == "text_lengths", field.name


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"extends: mine\n", "mine.yaml extends itself"),
        (b"extends: 5\n", "extends 5: give the name"),
        (b"5: x\n", "has the key 5: keys are names of options"),
        (b"- a\n", "not a YAML mapping"),
        (b"\xff\xfe\x00\x80", "mine.yaml is not UTF-8 text"),
        (b"data: " + b"[" * 3000, "mine.yaml is n"),
        (b"data: &a [*a]\n", "data is "),
        (b"a: !!python/object/apply:os.system [ls]\n", "mine.yaml is not YAML"),
    ],
)
def test_files_that_are_no_recipe_are_named(tmp_path, content, words):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        recipes.load(str(tmp_path / "mine.yaml"))


def test_an_unknown_recipe_says_which_was_probably_meant():
    with pytest.raises(ValueError, match="did you mean icedit_moe"):
        recipes.load("icedit-moe")
    with pytest.raises(ValueError, match="neither a file nor"):
        recipes.load("x" * 5000)


def test_unknown_recipe_lists_the_bundled_ones():
    with pytest.raises(ValueError, match="icedit_moe"):
        recipes.load("nothing")


def test_a_bare_no_in_yaml_is_the_word(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("task: fill\nmixed_precision: no\n", encoding="utf-8")
    assert recipes.load(str(recipe)).mixed_precision == "no"
    assert recipes.load("icedit", ["mixed_precision=no"]).mixed_precision == "no"


def test_what_is_not_yaml_is_named_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"shapes:256\?task=inpaint\]': the value is not YAML; put quotes"):
        recipes.read("icedit", ["data=[shapes:256?task=inpaint]"])
    assert recipes.read("icedit", ['data=["shapes:256?task=inpaint"]'])["data"] == ["shapes:256?task=inpaint"]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("task: fill\ndata: [a: b: c]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="mine.yaml is not YAML in line 2"):
        recipes.read(str(recipe))
