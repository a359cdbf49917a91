"""Reward training as ordered from the graph: choices become a recipe, and data needs no target images."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_diptych.nodes import grpo as nodes
from comfyui_diptych.training.choices import PRESETS, RewardChoices, configure, is_small
from comfyui_diptych.training.data import specs
from comfyui_diptych.training.data.sources import open_source
from comfyui_diptych.training.evaluate import history
from PIL import Image

pytest.importorskip("transformers")


def model_at(folder, part="transformer", channels=384):
    (folder / part).mkdir(parents=True)
    (folder / part / "config.json").write_text(json.dumps({"in_channels": channels}))
    (folder / part / "diffusion_pytorch_model.safetensors").write_bytes(b"few weights")
    return folder


def choices(model, **change):
    values = {"data": "shapes:4", "model": str(model), "name": "better", "rewards": ("shapes=1",), "steps": 7}
    return RewardChoices(**(values | change))


def test_the_node_offers_every_preset():
    assert set(nodes.PRESETS) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "part, channels, task",
    [("transformer", 384, "fill"), ("transformer", 64, "kontext"), ("unet", 9, "sd_inpaint")],
)
def test_every_preset_fits_every_family(tmp_path, preset, part, channels, task):
    made = choices(model_at(tmp_path / "m", part, channels), preset=preset)
    c = configure(made, tmp_path)
    assert (c.task, c.recipe, c.max_steps, c.resume) == (task, PRESETS[preset], 7, "auto")
    assert c.rewards == ["shapes=1"] and c.micro_batch == c.group_size * max(1, 48 // c.group_size)


def test_a_model_whose_weights_are_not_in_the_folder_is_no_toy(tmp_path):
    model = model_at(tmp_path / "m")
    assert is_small(model)
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert not is_small(model) and not is_small("a/hub-id")


def test_choices_are_laid_over_the_preset(tmp_path):
    model = model_at(tmp_path / "m")
    c = configure(
        choices(model, rank=5, lr=0.5, group_size=4, groups=3, resolution=48, start="x"),
        tmp_path,
    )
    assert (c.rank, c.lora_alpha, c.lr, c.group_size, c.groups_per_update) == (5, 10.0, 0.5, 4, 3)
    assert c.resolution == 48 and c.fuse_loras == ["x"]


def test_the_same_choices_find_their_run_again_and_another_reward_does_not(tmp_path):
    one = choices(tmp_path)
    assert one.folder() == choices(tmp_path, steps=99, preview_every=1).folder()
    assert one.folder() != choices(tmp_path, rewards=("jpeg_size=1",)).folder()


@pytest.mark.parametrize(
    "change, message", [({"preset": "slow"}, "use one of fast"), ({"name": "../x"}, "plain file name")]
)
def test_choices_that_do_not_go_together_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        configure(choices(model_at(tmp_path / "m"), **change), tmp_path)


def test_a_reward_without_weights_is_refused_before_anything_is_freed(tmp_path):
    """`comfy.run` configures first, and unloads ComfyUI's models then."""
    change = {"rewards": ("shapes=1", "hpsv2=0.5"), "reward_options": (f"hpsv2.path={tmp_path / 'gone.pt'}",)}
    with pytest.raises(ValueError, match="reward hpsv2 has no weights: .*gone.pt does not exist"):
        configure(choices(model_at(tmp_path / "m"), **change), tmp_path)


def test_a_folder_of_sources_and_instructions_is_enough(tmp_path):
    folder = tmp_path / "cats"
    folder.mkdir()
    for name in ("a", "b_source"):
        Image.new("RGB", (32, 16), (200, 10, 10)).save(folder / f"{name}.png")
        (folder / f"{name.removesuffix('_source')}.txt").write_text(f"make {name} blue\n")
    assert not specs.has_targets(folder)
    source = open_source(specs.edit_sources(folder))
    samples = [source[i] for i in range(len(source))]
    assert [sample.prompt for sample in samples] == ["make a blue", "make b_source blue"]
    assert torch.equal(samples[0].source, samples[0].target)
    Image.new("RGB", (32, 16)).save(folder / "b_target.png")
    assert specs.has_targets(folder)


def test_a_batch_of_images_with_one_or_as_many_instructions(tmp_path):
    images = torch.rand(2, 16, 24, 4, generator=torch.Generator().manual_seed(0))
    source = open_source(specs.save_sources(images, "make it blue\n", tmp_path))
    assert [source[i].prompt for i in range(2)] == ["make it blue"] * 2
    colour, alpha = images[1].split([3, 1], dim=-1)
    on_white = colour * alpha + (1 - alpha)  # what lies under transparent pixels is never seen
    torch.testing.assert_close(source[1].source, on_white, rtol=0, atol=0.5 / 255 + 1e-6)
    two = specs.save_sources(images, "one\n\ntwo", tmp_path)
    assert [open_source(two)[i].prompt for i in range(2)] == ["one", "two"]
    assert two == specs.save_sources(images, "one\ntwo", tmp_path)
    with pytest.raises(ValueError, match="3 lines for 2 images"):
        specs.save_sources(images, "a\nb\nc", tmp_path)


def test_the_reward_history_of_a_stopped_run_goes_on(tmp_path):
    rows = [{"step": 2, "reward/a": 1.0, "reward/b": 0.0}, {"step": 1, "reward/a": 0.5}]
    rows += [{"ratio": 1}, {"step": 3, "failed/a": 4}]  # no update, and one that nobody could judge
    (tmp_path / "rewards.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{half a li")
    assert history.rewards(tmp_path) == {1: 0.5, 2: 0.5}
    assert history.rewards(tmp_path / "none") == {}


def test_a_step_that_was_made_again_counts_as_it_was_made_last(tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}]
    rows.append({"step": 3, "loss": float("nan")})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n[1]\n{half a li")
    assert history.losses(tmp_path) == {1: 3.0, 2: 2.0}
    assert history.losses(tmp_path / "none") == {}
