"""The training nodes without ComfyUI: choices become recipes, scores tell good edits from bad."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_diptych.nodes import menus
from comfyui_diptych.nodes import training as nodes
from comfyui_diptych.nodes.score import DiptychEditScore
from comfyui_diptych.training import session
from comfyui_diptych.training.choices import Choices, configure, task_of
from comfyui_diptych.training.data.sources import open_source
from comfyui_diptych.training.data.specs import spec_of
from comfyui_diptych.training.tiny import shapes
from comfyui_diptych.training.tiny.shapes.words import understand
from PIL import Image


def model_at(folder: Path, part="transformer", channels=384) -> Path:
    (folder / part).mkdir(parents=True)
    (folder / part / "config.json").write_text(json.dumps({"in_channels": channels}))
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture
def comfyui(tmp_path, monkeypatch):
    """A folder_paths module with an input folder of pairs and one base model."""
    pairs = tmp_path / "input" / "cats"
    pairs.mkdir(parents=True)
    for name in ("a_source.png", "a_target.png"):
        Image.new("RGB", (16, 16)).save(pairs / name)
    (pairs / "a.txt").write_text("make it black")
    model_at(tmp_path / "models" / "my-fill")
    paths = SimpleNamespace(
        get_input_directory=lambda: str(tmp_path / "input"),
        get_folder_paths=lambda kind: [str(tmp_path / "models")] if kind == "diffusers" else [],
    )
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    return tmp_path


def test_the_menus_offer_what_is_on_disk_and_something_to_try(comfyui):
    required = nodes.DiptychTrainLora.INPUT_TYPES()["required"]
    assert required["dataset"][0] == [menus.DEMO, "cats"]
    assert required["base_model"][0] == [*menus.TINY, "my-fill"]
    assert menus.data_spec("cats", "fill") == f"pairs:{comfyui / 'input' / 'cats'}"
    assert menus.model_folder("my-fill") == comfyui / "models" / "my-fill"


def test_menu_entries_that_vanished_say_where_to_put_them(comfyui):
    with pytest.raises(ValueError, match="'dogs'.*ComfyUI's input folder"):
        menus.data_spec("dogs", "fill")
    with pytest.raises(ValueError, match="'gone'.*models/diffusers"):
        menus.model_folder("gone")


def test_adding_an_image_to_the_folder_trains_again(comfyui):
    before = nodes.DiptychTrainLora.IS_CHANGED(dataset="cats", steps=1)
    assert before == nodes.DiptychTrainLora.IS_CHANGED(dataset="cats")
    Image.new("RGB", (16, 16)).save(comfyui / "input" / "cats" / "b_source.png")
    assert before != nodes.DiptychTrainLora.IS_CHANGED(dataset="cats")


@pytest.mark.parametrize(
    "part, channels, task, recipe",
    [
        ("transformer", 384, "fill", "icedit"),
        ("transformer", 64, "kontext", "kontext"),
        ("unet", 9, "sd_inpaint", "sd_inpaint_dreambooth"),
    ],
)
def test_the_base_model_picks_the_recipe(tmp_path, part, channels, task, recipe):
    pytest.importorskip("transformers")
    model = model_at(tmp_path / "m", part, channels)
    choices = Choices("shapes:4", str(model), "cat", steps=7, rank=5, lr=0.5, resolution=48)
    config = configure(choices, tmp_path)
    assert (config.task, config.recipe, config.max_steps, config.rank, config.lr) == (task, recipe, 7, 5, 0.5)
    assert config.resolution == 48 and config.model == str(model) and config.data == ["shapes:4"]
    assert config.resume == "auto" and config.class_images == "" and config.optimizer == "adamw"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "../evil"}, "plain file name"),
        ({"name": ""}, "plain file name"),
        ({"recipe": "kontext"}, "choose recipe auto"),
        ({"resolution": 50}, "multiple of 16"),
        ({"precision": "int3"}, "precision is 'int3'"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_in_one_sentence(tmp_path, change, message):
    pytest.importorskip("transformers")
    model = model_at(tmp_path / "m")
    choices = Choices(**({"data": "shapes:4", "model": str(model), "name": "cat"} | change))
    with pytest.raises(ValueError, match=message):
        configure(choices, tmp_path)


def test_other_models_are_refused_by_their_channels(tmp_path):
    with pytest.raises(ValueError, match="takes 4 channels"):
        task_of(model_at(tmp_path / "a", "unet", 4))
    with pytest.raises(ValueError, match="no diffusers folder"):
        task_of(tmp_path)


def test_the_same_settings_find_their_run_again_and_others_do_not():
    one = Choices("pairs:a", "m", "cat", steps=10)
    assert one.folder() == Choices("pairs:a", "m", "cat", steps=99, preview_every=3).folder()
    assert one.folder() != Choices("pairs:a", "m", "cat", steps=10, rank=8).folder()


def test_a_lora_of_another_origin_is_never_overwritten(tmp_path):
    loras, runs = tmp_path / "loras", [tmp_path / "run1", tmp_path / "run2"]
    for number, run in enumerate(runs):
        run.mkdir()
        (run / "cat.safetensors").write_bytes(bytes([number]))
    places = [session.publish(run / "cat.safetensors", loras, run) for run in (*runs, *runs)]
    assert [place.name for place in places] == ["cat.safetensors", "cat_2.safetensors"] * 2
    assert [place.read_bytes() for place in places[:2]] == [b"\x00", b"\x01"]


def test_a_lora_that_cannot_be_copied_says_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "cat.safetensors").write_bytes(b"x")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session.shutil, "copyfile", full)
    with pytest.raises(ValueError, match="whole in .*cat.safetensors, but cannot .*No space left on device"):
        session.publish(tmp_path / "cat.safetensors", tmp_path / "loras", tmp_path)
    assert not list((tmp_path / "loras").iterdir())


def test_folders_are_recognised_by_their_files(tmp_path):
    (tmp_path / "data.jsonl").write_text("{}")
    assert spec_of(tmp_path) == f"jsonl:{tmp_path / 'data.jsonl'}"
    (tmp_path / "x_target.png").write_bytes(b"")
    assert spec_of(tmp_path) == f"pairs:{tmp_path}"
    weighty = tmp_path / "cats@2"
    weighty.mkdir()
    for name in ("a_source.png", "a_target.png"):
        Image.new("RGB", (16, 16)).save(weighty / name)
    (weighty / "a.txt").write_text("make it black")
    assert open_source(spec_of(weighty))[0].prompt == "make it black"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="NAME_source.png"):
        spec_of(tmp_path / "empty")


def test_every_instruction_of_the_world_is_understood():
    edits = list(shapes.random_edits(7, 150, "val"))
    for edit in edits:
        understood = understand(edit.source, edit.instruction)
        assert understood is not None and understood.target == edit.target, edit.instruction
    assert understand(edits[0].source, "make it nicer") is None


def score(*batches, **options):
    return DiptychEditScore().score(*batches, **options)["result"]


def test_scores_tell_the_edit_from_no_edit_and_from_a_spoilt_one():
    pair = next(p for p in shapes.edit_pairs(3, 20, "test") if len(p.edit.places) == 1)
    source, target, mask = pair.source[None], pair.target[None], pair.mask[None]
    good = score(target, source, pair.instruction, mask)
    idle = score(source, source, pair.instruction, mask)
    spoilt = score(1 - target, source, pair.instruction, mask)
    assert (good[0], good[3]) == (1, 1) and good[1] > 0
    assert (idle[0], idle[1], idle[2], idle[3]) == (1, 0, pytest.approx(1), 0)
    assert spoilt[0] < 0.9 and spoilt[3] == 0
    assert score(target, source, "", mask, expected=target)[2:4] == (pytest.approx(1), 1)
    assert "success" in good[4] and good[5].shape[0] == 1 and good[5].shape[-1] == 3


def test_a_mask_over_all_of_the_image_leaves_nothing_to_keep():
    batches = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    whole = score(batches[:1], batches[1:], mask=torch.ones(1, 16, 16))
    assert whole[0] == 1.0 and whole[1] > 0 and "nothing to keep" in whole[4] and "nan" not in whole[4]
    none = score(batches[:1], batches[:1])  # no mask, and no edit to tell where one would be
    assert none[1] == 0.0 and "nothing to change" in none[4] and "nan" not in none[4]
    empty = score(batches[:1], batches[1:], mask=torch.zeros(1, 64, 64))
    assert empty[:5] == score(batches[:1], batches[1:])[:5]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -5.0])
def test_an_edit_out_of_range_is_refused_or_measured_as_it_is_seen(value):
    source = torch.full((1, 16, 16, 3), 0.5)
    edited = source.clone()
    edited[0, :4] = value
    if not math.isfinite(value):
        with pytest.raises(ValueError, match="edited"):
            score(edited, source)
        return
    assert score(edited, source)[:4] == score(edited.clamp(0, 1), source)[:4]


def test_photographs_get_distances_and_no_verdict():
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand(2, 40, 30, 4, generator=generator)
    kept, changed, similarity, success, report, _ = score(photo, photo[:1], "make it blue")
    assert success == -1 and len(report.splitlines()) == 3
    with pytest.raises(ValueError, match="source is 20x20 but edited is 30x40"):
        score(photo, torch.zeros(1, 20, 20, 3))


def test_a_dataset_of_the_menu_names_no_file_outside_of_itself(tmp_path, monkeypatch):
    """Anybody who may upload into ComfyUI's input folder may write such a file."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "private.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "../private.png", "text": "x"}')
    monkeypatch.setattr(menus, "datasets", lambda: {"data": folder})
    with pytest.raises(ValueError, match="outside of the data folder"):
        open_source(menus.data_spec("data", "fill"))[0]


def test_what_was_done_to_the_data_stands_in_the_report(tmp_path):
    config = session.TrainConfig()
    assert "\n3 images were stretched" in session._report(
        config, 1, {}, tmp_path, ["3 images were stretched"]
    )


def test_a_stopped_run_says_where_its_checkpoint_is_and_how_to_go_on(tmp_path):
    config = session.TrainConfig(output_dir=str(tmp_path))
    step = tmp_path / "checkpoints" / "step_00000007"
    first, where, how = session._report(config, 7, {}, step).splitlines()[:3]
    assert first.startswith("stopped at 7 of ") and where == f"checkpoint: {step}"
    assert how == "to go on, run the node again with the same settings"
    assert "\nno checkpoint yet\n" in session._report(config, 0, {}, tmp_path)
    (lora := tmp_path / "x.safetensors").write_bytes(b"")
    assert "to go on" not in session._report(config, 7, {}, lora)


@pytest.mark.parametrize("cls, name", [("DiptychTrainLora", "recipe"), ("DiptychTrainGRPO", "preset")])
def test_what_auto_means_is_what_a_run_takes(cls, name, tmp_path):
    """The words for the page, against the recipe that a run with auto is configured by."""
    from comfyui_diptych import NODE_CLASS_MAPPINGS
    from comfyui_diptych.training.choices import RewardChoices

    schema = NODE_CLASS_MAPPINGS[cls].INPUT_TYPES()
    meant = schema["required"]["base_model"][1]["meant"]
    assert set(meant) == set(menus.TINY)
    for model, words in meant.items():
        assert set(words) <= set(schema["optional"][name][0]) and words
        more = {"data": "shapes:4", "model": str(menus.model_folder(model)), "name": "x"}
        for recipe, said in words.items():
            if name == "preset":
                reward = {"preset": recipe, "rewards": ("shapes",)}
                config = configure(RewardChoices(**more, recipe=recipe, **reward), tmp_path)
                assert said.startswith(f"group_size {config.group_size}, groups {config.groups_per_update}, ")
            else:
                config = configure(Choices(**more, recipe=recipe), tmp_path)
                assert said.endswith(f", batch_size {config.batch_size}")
            rate = said.partition("learning_rate ")[2].partition(",")[0]
            assert float(rate) == config.lr and f"rank {config.rank}, " in said
