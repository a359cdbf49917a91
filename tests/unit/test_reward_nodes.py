"""Rewards as a person chooses them, on images at hand: nodes and judges without ComfyUI."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from comfyui_diptych.models import diptych
from comfyui_diptych.nodes import rewards as nodes
from comfyui_diptych.training.evaluate.edit_report import edit_report
from comfyui_diptych.training.evaluate.judge import Judge, rank
from comfyui_diptych.training.rewards import Context, Selection, Spec, base, create, from_recipe, names, parse
from comfyui_diptych.training.rewards.base import Reward
from comfyui_diptych.training.tiny import shapes


class Bright(Reward):
    """Mean brightness; images without any light cannot be judged."""

    name = "test_bright"

    def _score(self, images, context):
        means = images.mean((1, 2, 3))
        return torch.where(means > 0, means, torch.nan)


@pytest.fixture(autouse=True)
def one_more_reward(monkeypatch):
    monkeypatch.setitem(base._REGISTRY, "test_bright", Bright)


def choose(name, weight=1.0, **options):
    return nodes.DiptychReward().choose(name, weight, **options)[0]


def greys(*values, size=(16, 24)):
    return torch.tensor(values)[:, None, None, None].expand(-1, *size, 3).clone()


@pytest.fixture
def models(tmp_path, monkeypatch):
    folder = tmp_path / "diptych_rewards"
    (folder / "PickScore_v1").mkdir(parents=True)
    for name in ("HPS_v2.1_compressed.pt", "readme.txt", "evil.py"):
        (folder / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace(models_dir=str(tmp_path)))
    return folder


def test_only_registered_rewards_and_local_weights_are_offered(models):
    schema = nodes.DiptychReward.INPUT_TYPES()
    assert schema["required"]["name"][0] == names()
    assert not [name for name in names() if ":" in name or "/" in name]
    assert schema["optional"]["weights_file"][0] == ["published", "HPS_v2.1_compressed.pt", "PickScore_v1"]
    for name in ("os:system", "http://example.org"):
        with pytest.raises(ValueError, match="not known: choose one of"):
            choose(name)
    with pytest.raises(ValueError, match="not in models/diptych_rewards"):
        choose("pickscore", weights_file="../../evil.py")


def test_a_reward_that_has_no_published_place_says_what_to_put_where(models):
    with pytest.raises(
        ValueError, match="put HPS_v2.1_compressed.pt of https://.* into models/diptych_rewards"
    ):
        choose("hpsv2")
    chosen = choose("hpsv2", weights_file="HPS_v2.1_compressed.pt")
    assert dict(chosen.specs[0].options)["path"] == str(models / "HPS_v2.1_compressed.pt")


def test_rewards_chain_and_the_first_choice_stays_as_it_was():
    first = choose("jpeg_size")
    second = choose("test_bright", 0.5, also=first)
    assert str(first) == "jpeg_size x 1" and str(second) == "jpeg_size x 1, test_bright x 0.5"
    with pytest.raises(ValueError, match="jpeg_size was chosen twice"):
        choose("jpeg_size", also=second)
    for weight in (0.0, float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=f"weight of reward jpeg_size is {weight:g}"):
            choose("jpeg_size", weight)
    with pytest.raises(ValueError, match="keep_l1 has no option 'path': it takes none"):
        Spec("keep_l1", 1.0, (("path", "x"),))


def test_a_choice_becomes_the_same_rewards_in_a_recipe():
    chosen = choose("test_bright", 0.25, also=choose("jpeg_size"))
    made = from_recipe(chosen.recipe()["rewards"], []).composite
    assert made.weights == chosen.composite.weights == {"jpeg_size": 1.0, "test_bright": 0.25}
    assert Selection((Spec("clip_l", 1.0, (("path", "here"),)),)).recipe() == {
        "rewards": ["clip_l=1"],
        "reward_options": ["clip_l.path=here"],
    }


@pytest.mark.parametrize(
    "text, expected",
    [
        ("clip_l", Spec("clip_l")),
        ("clip_l=0.5", Spec("clip_l", 0.5)),
        ("clip_l=2:path=C:/a,device=cpu", Spec("clip_l", 2.0, (("path", "C:/a"), ("device", "cpu")))),
    ],
)
def test_a_judge_of_the_command_line(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text, message",
    [("nonsense", "choose one of"), ("clip_l=x", "write a number"), ("clip_l:path", "write key=value")],
)
def test_a_judge_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_recipe_names_rewards_as_judges_are_named_and_may_leave_the_list():
    texts = ["clip_l=2:device=cpu", "math:fsum=0.5", "http://127.0.0.1:9/a=b", "jpeg_size"]
    options = ["clip_l.path=C:/a", "http://127.0.0.1:9/a.b.retries=1"]
    with pytest.raises(ValueError, match="reward option 'http://127.0.0.1:9/a.b.retries=1'"):
        from_recipe(texts, options)
    chosen = from_recipe(texts, ["clip_l.path=C:/a"])
    assert str(chosen) == "clip_l x 2, math:fsum x 0.5, http://127.0.0.1:9/a=b x 1, jpeg_size x 1"
    assert chosen.specs[0].options == (("device", "cpu"), ("path", "C:/a"))
    assert from_recipe(**chosen.recipe()) == chosen
    for text in texts[1:3]:
        with pytest.raises(ValueError, match="not known: choose one of"):
            parse(text)
    with pytest.raises(ValueError, match="jpeg_size was chosen twice"):
        from_recipe(["jpeg_size", "jpeg_size=2"], [])
    with pytest.raises(ValueError, match="rewards is empty"):
        from_recipe([], [])


def test_options_are_numbers_where_a_reward_takes_numbers():
    served = from_recipe(["http://127.0.0.1:9"], ["http://127.0.0.1:9.timeout=2"])
    reward = served.composite.rewards[0]
    assert (reward.timeout, reward.retries) == (2, 3)


def test_weights_that_are_not_there_name_the_reward(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="reward clip_l has no weights: .*nowhere does not exist"):
        Selection((parse(f"clip_l:path={tmp_path / 'nowhere'}"),)).composite  # noqa: B018
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="reward clip_l cannot be loaded .*: give a file or folder as path"):
        Selection((parse(f"clip_l:path={tmp_path}"),)).composite  # noqa: B018


def test_a_batch_is_sorted_best_first_and_what_cannot_be_judged_comes_last():
    images = greys(0.2, 0.0, 0.9, 0.5)
    out = nodes.DiptychRewardScore().score(images, choose("test_bright"))["result"]
    assert out[0] == pytest.approx(0.9)
    assert out[2].mean((1, 2, 3)).tolist() == pytest.approx([0.9, 0.5, 0.2, 0.0])
    assert out[1].splitlines()[0] == "1. image 3: test_bright 0.9"
    assert "could not judge 1 images" in out[1]
    assert out[3].ndim == 4 and out[3].shape[-1] == 3
    worst = nodes.DiptychRewardScore().score(images, choose("test_bright", -1.0))["result"]
    assert worst[2].mean((1, 2, 3)).tolist() == pytest.approx([0.2, 0.5, 0.9, 0.0])
    with pytest.raises(ValueError, match="test_bright could judge none of 1 images"):
        nodes.DiptychRewardScore().score(greys(0.0), choose("test_bright"))


def corner(height, width):
    """A mask whose edit is one pixel."""
    mask = torch.zeros(1, height, width)
    mask[0, 0, 0] = 1
    return mask


def test_an_empty_mask_is_none():
    """Load Image gives one for an image without alpha."""
    empty = {"source": greys(0.2), "mask": torch.zeros(1, 64, 64)}
    with pytest.raises(ValueError, match="keep_l1 needs masks: connect them.*the mask is empty"):
        nodes.DiptychRewardScore().score(greys(0.2), choose("keep_l1"), **empty)
    reports = [edit_report(greys(0.2, 0.4), greys(0.2), mask=mask) for mask in (None, torch.zeros(1, 64, 64))]
    assert reports[0].text == reports[1].text


def test_nothing_to_keep_is_said_and_no_number():
    everywhere = {"source": greys(0.2), "mask": torch.ones(1, 16, 24)}
    with pytest.raises(ValueError, match="keep_l1 could judge none of 2 images: the mask covers all"):
        nodes.DiptychRewardScore().score(greys(0.2, 0.4), choose("keep_l1"), **everywhere)
    both = choose("keep_l1", also=choose("test_bright"))
    report = nodes.DiptychRewardScore().score(greys(0.2, 0.4), both, **everywhere)["result"][1]
    assert "keep_l1 not judged" in report and "nan" not in report


def test_several_rewards_are_brought_to_one_scale():
    chosen = choose("keep_l1", 3.0, also=choose("test_bright"))
    images, judge = greys(0.2, 0.4, 0.6), Judge.of(chosen, source=greys(0.2), mask=corner(16, 24))
    ranking = rank(judge, images)
    # keep_l1 falls as fast as brightness rises, and weighs three times as much
    assert ranking.order == [0, 1, 2]
    assert ranking.scores[0] == pytest.approx(2 * math.sqrt(1.5), rel=1e-2)
    assert ranking.scores[1] == pytest.approx(0, abs=1e-5)


def test_what_a_reward_lacks_is_said_in_one_sentence():
    with pytest.raises(ValueError, match="reward keep_l1 needs masks, sources: connect them"):
        nodes.DiptychRewardScore().score(greys(0.5), choose("keep_l1"))
    with pytest.raises(ValueError, match="shapes needs targets, or sources and prompts"):
        Judge.of(choose("shapes"), "make it red")


def test_sources_of_another_size_are_brought_to_the_images():
    out = nodes.DiptychRewardScore().score(
        greys(0.5, 0.25), choose("keep_l1"), source=greys(0.5, size=(32, 48)), mask=corner(8, 12)
    )["result"]
    assert out[0] == pytest.approx(1.0, abs=1e-5)


def test_a_judge_with_a_layout_sees_the_edited_panel_alone():
    pairs = list(shapes.edit_pairs(0, 3, "test"))
    built = diptych.build(pairs[0].source[None], pairs[0].instruction, panel_width=64)
    wanted = torch.cat([pairs[0].source, pairs[0].target], dim=1)
    idle = torch.cat([pairs[0].source, pairs[0].source], dim=1)
    judge = Judge.of(choose("shapes"), pairs[0].instruction, layout=built.layout)
    good, bad = judge(torch.stack([wanted, idle])).tolist()
    assert good == 1 and bad < 0.6
    assert judge.context.sources is built.layout.source


def test_the_shapes_reward_reads_the_wanted_scene_off_the_instruction():
    pairs = list(shapes.edit_pairs(5, 6, "test"))
    images = torch.stack([pair.target for pair in pairs[:3]] + [pair.source for pair in pairs[3:]])
    sources, prompts = torch.stack([pair.source for pair in pairs]), [pair.instruction for pair in pairs]
    reward = create("shapes")
    read = reward.score(images, Context(prompts, sources))
    known = reward.score(images, Context(targets=torch.stack([pair.target for pair in pairs])))
    torch.testing.assert_close(read, known)
    assert reward.score(images[:1], Context(["make it nicer"], sources[:1])).isnan().all()
