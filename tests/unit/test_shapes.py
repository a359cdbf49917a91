"""The shapes world: drawing against brute force, edits against their words, the checker against both."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from comfyui_diptych.training.tiny import shapes
from comfyui_diptych.training.tiny.shapes.scenes import SIZES


@pytest.fixture(scope="module")
def scenes() -> list[shapes.Scene]:
    rng = random.Random(0)
    return [shapes.random_scene(rng, "test") for _ in range(400)]


@pytest.fixture(scope="module")
def rendered(scenes) -> torch.Tensor:
    return shapes.render_many(scenes)


@pytest.fixture(scope="module")
def pairs() -> list[shapes.EditPair]:
    return list(shapes.edit_pairs(3, 300, "test"))


def _inside(kind: str, x: torch.Tensor, y: torch.Tensor, r: float) -> torch.Tensor:
    """The shapes as plain geometry, independent of the distances that the renderer uses."""
    if kind == "circle":
        return x**2 + y**2 < r**2
    if kind == "square":
        return (x.abs() < 0.86 * r) & (y.abs() < 0.86 * r)
    if kind == "triangle":
        return (y < 0.94 * r) & (x.abs() < (y + r) / 2)
    return ((x.abs() < r) & (y.abs() < 0.34 * r)) | ((y.abs() < r) & (x.abs() < 0.34 * r))


@pytest.mark.parametrize("kind", shapes.KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_drawn_shape_equals_its_geometry_sampled_eight_times_finer(kind, size):
    scene = shapes.Scene("black", (shapes.Shape(kind, "white", size, "top left"),))
    fine = (torch.arange(64 * 8) + 0.5) / 8 - 16
    y, x = torch.meshgrid(fine, fine, indexing="ij")
    cover = F.avg_pool2d(_inside(kind, x, y, SIZES[size] * 64).float()[None], 8)[0, :, :, None]
    black, white = (torch.tensor(shapes.COLOURS[c]) for c in ("black", "white"))
    difference = (shapes.render(scene) - (black + cover * (white - black))).abs()
    assert difference.mean() < 0.002 and difference.max() < 0.35


def test_the_checker_reads_its_own_targets_and_rejects_shuffled_ones(scenes, rendered):
    reading = shapes.read(rendered)
    assert reading.matches(scenes).float().mean() >= 0.995
    assert reading.matches(scenes[1:] + scenes[:1]).float().mean() <= 0.01
    assert [reading.scene(i) for i in range(50)] == scenes[:50]


@pytest.mark.parametrize("size", (32, 128, 192))
def test_the_checker_reads_other_sizes(scenes, size):
    assert shapes.read(shapes.render_many(scenes[:40], size)).matches(scenes[:40]).all()


@pytest.mark.parametrize("blur, noise, least", ((0.7, 0.05, 0.99), (1.0, 0.05, 0.99), (1.5, 0.02, 0.9)))
def test_the_checker_survives_the_blur_and_noise_of_a_vae(scenes, rendered, blur, noise, least):
    line = torch.exp(-(torch.arange(-4, 5) ** 2) / (2 * blur**2))
    kernel = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 9, 9)
    padded = F.pad(rendered.permute(0, 3, 1, 2), (4, 4, 4, 4), mode="replicate")
    soft = F.conv2d(padded, kernel, groups=3).permute(0, 2, 3, 1)
    soft = soft + noise * torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))
    assert shapes.read(soft.clamp(0, 1)).matches(scenes).float().mean() >= least


def test_grey_noise_and_mixtures_are_unreadable(scenes, rendered):
    noise = torch.rand(100, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    for wrong in (noise, torch.full((1, 64, 64, 3), 0.5), rendered[:100] / 2 + rendered[100:200] / 2):
        assert shapes.read(wrong).matches(scenes[: len(wrong)]).sum() == 0


def test_a_report_names_what_is_wrong(scenes):
    rng = random.Random(5)
    scene = next(s for s in iter(lambda: shapes.random_scene(rng), None) if len(s.shapes) == 2)
    first, second = scene.shapes
    assert shapes.check(shapes.render(scene), scene).score == 1.0
    other = next(k for k in shapes.KINDS if k != first.kind)
    drawn = shapes.render(shapes.Scene(scene.background, (replace(first, kind=other), second)))
    report = shapes.check(drawn, scene, source=drawn)
    assert [(r.found, r.kind, r.colour, r.place) for r in report.objects] == [
        (True, False, True, True),
        (True, True, True, True),
    ]
    assert not report.exact and 0.7 < report.score < 1 and report.untouched_error == 0
    gone = shapes.check(shapes.render(shapes.Scene(scene.background, (second,))), scene)
    assert not gone.objects[0].found and gone.extra == 0
    extra = shapes.check(shapes.render(scene), shapes.Scene(scene.background, (second,)))
    assert extra.extra == 1 and extra.score < 1


def test_an_edit_changes_what_its_mask_covers_and_nothing_else(pairs):
    for pair in pairs:
        changed = (pair.source != pair.target).any(-1)
        assert changed.any() and not changed[pair.mask == 0].any()


def test_success_needs_the_change_and_everything_else(pairs):
    edits = [p.edit for p in pairs]
    done = shapes.edit_success(torch.stack([p.target for p in pairs]), edits)
    idle = shapes.edit_success(torch.stack([p.source for p in pairs]), edits)
    assert all(v.all() for v in done.values())
    assert idle["kept"].all() and not idle["made"].any() and not idle["success"].any()
    for pair, target in ((p, shapes.render(replace(p.edit.target, shapes=()))) for p in pairs[:50]):
        if len(pair.edit.target.shapes) > 1:
            assert not shapes.edit_success(target[None], [pair.edit])["success"].any()


def test_instructions_name_what_they_change_in_several_wordings():
    seen = {operation: set() for operation in shapes.OPERATIONS}
    for edit in shapes.random_edits(0, 600, "train"):
        seen[edit.operation].add(edit.instruction.split()[0])
        gone = [s for s in edit.source.shapes if s not in edit.target.shapes]
        for shape in gone:
            assert edit.operation == "background" or shape.name in edit.instruction
    assert all(len(first_words) >= 3 for first_words in seen.values())


def test_splits_share_no_image_and_are_reproducible():
    drawn = {split: list(shapes.random_edits(1, 400, split)) for split in shapes.SPLITS}
    seen = {split: {s for e in edits for s in (e.source, e.target)} for split, edits in drawn.items()}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"]
    assert not seen["val"] & seen["test"]
    assert list(shapes.random_edits(1, 400, "val")) == drawn["val"]


def test_a_caption_tells_scenes_apart(scenes):
    rng = random.Random(9)
    many = {shapes.random_scene(rng) for _ in range(3000)}
    assert len({s.caption for s in many}) == len(many)


def test_places_match_looks_only_where_it_is_asked_to(scenes, rendered):
    spoilt = rendered.clone()
    spoilt[:, :32, :32] = 0.5
    assert shapes.places_match(spoilt, scenes, [("bottom left", "bottom right")] * len(scenes)).all()
    assert not shapes.places_match(spoilt, scenes, [("top left",)] * len(scenes)).any()


@pytest.mark.parametrize(
    "call",
    (
        lambda: list(shapes.random_edits(0, 1, "nowhere")),
        lambda: shapes.render(shapes.Scene("red", ()), 33),
        lambda: shapes.read(torch.zeros(1, 64, 32, 3)),
        lambda: shapes.check_many(torch.zeros(2, 64, 64, 3), [shapes.Scene("red", ())]),
    ),
)
def test_wrong_input_is_named(call):
    with pytest.raises(ValueError, match=r"nowhere|33|32|2 images"):
        call()


def test_edits_of_images_with_one_shape():
    edits = list(shapes.random_edits(3, 200, "test", single=True))
    assert all(len(edit.source.shapes) == 1 for edit in edits)
    assert {edit.operation for edit in edits} == {*shapes.OPERATIONS} - {"remove"}
    assert {edit.source.split for edit in edits} == {"test"}
    with pytest.raises(ValueError, match="the image has one shape"):
        next(shapes.random_edits(0, 1, operations=["remove"], single=True))
    pairs = list(shapes.edit_pairs(0, 2, size=56, single=True))
    assert [pair.source.shape for pair in pairs] == [(56, 56, 3)] * 2
