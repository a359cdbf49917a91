"""An image goes into a diptych and comes back: its own size, and bit for bit where nothing was resampled."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from comfyui_diptych.models import diptych as dp
from hypothesis import given, settings
from hypothesis import strategies as st

SIDES = ("right", "left", "bottom", "top")


def random_image(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(height, width):
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    return torch.stack((y.expand(height, width), x.expand(height, width), 0.5 * (x + y)), dim=-1)[None]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(17, 70),
    st.integers(17, 70),
    st.sampled_from([1, 3, 4]),
    st.sampled_from(["crop", "pad"]),
    st.sampled_from((*SIDES, "none")),
)
def test_split_of_build_is_the_source_bit_for_bit_at_its_own_scale(
    batch, height, width, channels, policy, side
):
    source = random_image(batch, height, width, channels)
    built = dp.build(source, panel_width=0, policy=policy, side=side)
    assert built.image.shape[1] % 16 == built.image.shape[2] % 16 == 0
    expected = source.expand(-1, -1, -1, 3) if channels == 1 else source
    edited, beside = dp.split(built)
    assert torch.equal(edited, expected) and torch.equal(beside, expected)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(10, 90),
    st.integers(10, 90),
    st.sampled_from(dp.geometry.POLICIES),
    st.sampled_from((*SIDES, "none")),
    st.sampled_from([0, 32, 64]),
)
def test_split_always_returns_the_source_size_and_about_the_source(height, width, policy, side, panel):
    source = smooth(height, width)
    edited, beside = dp.split(dp.build(source, panel_width=panel, policy=policy, side=side))
    assert edited.shape == beside.shape == source.shape
    if min(height, width) >= 48:
        assert float((edited - source).abs().max()) < 0.05


def test_a_source_that_fits_already_is_never_touched():
    source = random_image(2, 48, 64, 3)
    for policy in dp.geometry.POLICIES:
        built = dp.build(source, panel_width=64, policy=policy)
        assert built.image.shape == (2, 48, 128, 3)
        assert torch.equal(built.image, torch.cat((source, source), dim=2))
        assert torch.equal(dp.split(built).edited, source)


@pytest.mark.parametrize("side", SIDES)
def test_the_mask_is_the_edit_panel_and_the_edit_is_read_from_there(side):
    source = random_image(1, 32, 48, 3)
    built = dp.build(source, "x", panel_width=48, side=side)
    axis = 2 if side in ("right", "left") else 1
    halves = built.mask.chunk(2, dim=axis)
    edit, keep = halves if side in ("left", "top") else halves[::-1]
    assert bool((edit == 1).all()) and not keep.any()
    painted = torch.where(built.mask[..., None] > 0, 0.25, built.image)
    edited, beside = dp.split(painted, built.layout)
    assert bool((edited == 0.25).all()) and torch.equal(beside, source)


@pytest.mark.parametrize("policy", dp.geometry.POLICIES)
@pytest.mark.parametrize("panel", [0, 32, 128])
def test_outside_the_edit_mask_the_source_is_returned_exactly(policy, panel):
    source, region = random_image(2, 75, 53, 3), torch.zeros(1, 75, 53)
    region[:, 20:50, 10:40] = 1
    built = dp.build(source, "x", edit_mask=region, panel_width=panel, policy=policy)
    edited = dp.split(torch.full_like(built.image, 0.3), built.layout, feather=4).edited
    outside = (region == 0).expand(2, -1, -1)
    assert torch.equal(edited[outside], source[outside])
    assert torch.allclose(edited[:, 30:40, 20:30], torch.tensor(0.3))
    middle = edited[:, 20:50, 10:40]
    assert float((middle - source[:, 20:50, 10:40]).abs().max()) > 0.2


def test_feathering_fades_from_source_to_edit():
    source, region = torch.zeros(1, 64, 64, 3), torch.zeros(1, 64, 64)
    region[:, :, 32:] = 1
    built = dp.build(source, edit_mask=region, panel_width=0)
    row = dp.split(torch.ones_like(built.image), built.layout, feather=7).edited[0, 10, :, 0]
    assert torch.allclose(row, (torch.arange(64).float() - 31).clamp(0, 8) / 8)


def test_outside_the_edit_mask_the_edit_panel_shows_the_source():
    source, region = random_image(1, 32, 32, 3), torch.zeros(32, 32)
    region[8:16, 8:16] = 1
    for second in ("gray", "noise", "copy"):
        built = dp.build(source, edit_mask=region, panel_width=32, second=second, seed=1)
        right = built.image[:, :, 32:]
        assert torch.equal(built.mask[0, :, 32:], region) and not built.mask[0, :, :32].any()
        assert torch.equal(right[:, region == 0], source[:, region == 0])
        if second == "gray":
            assert bool((right[:, region == 1] == 0.5).all())


def test_noise_depends_on_the_seed_only():
    first, again, other = (
        dp.build(random_image(1, 32, 32, 3), second="noise", seed=s, panel_width=32).image for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[:, :, :32], other[:, :, :32])


def test_a_mask_of_another_size_follows_the_image():
    region = torch.zeros(1, 40, 20)
    region[:, 20:] = 1
    built = dp.build(random_image(1, 64, 64, 3), edit_mask=region, panel_width=64)
    assert torch.equal(built.mask[0, :, 64:], torch.cat((torch.zeros(32, 64), torch.ones(32, 64))))


@pytest.mark.parametrize("images, masks", [(1, 3), (3, 1), (2, 4), (3, 2)])
def test_batches_of_unequal_length_repeat(images, masks):
    source, regions = random_image(images, 32, 32, 3), torch.zeros(masks, 32, 32)
    for i in range(masks):
        regions[i, i * 4 : i * 4 + 4] = 1
    built = dp.build(source, edit_mask=regions, panel_width=32)
    batch = max(images, masks)
    assert built.image.shape[0] == built.mask.shape[0] == batch
    edited = dp.split(torch.ones_like(built.image), built.layout).edited
    for i in range(batch):
        region, original = regions[i % masks] > 0, source[i % images]
        assert bool((edited[i][region] == 1).all()) and torch.equal(edited[i][~region], original[~region])


def test_a_batch_of_edits_of_one_image_comes_back_as_a_batch():
    source = random_image(1, 50, 40, 4)
    built = dp.build(source, panel_width=0, policy="crop")
    edits = built.image.repeat(4, 1, 1, 1)
    edited, beside = dp.split(edits, built.layout)
    assert torch.equal(edited, source.expand(4, -1, -1, -1)) and torch.equal(beside, edited)


def test_cropped_borders_and_alpha_come_back_from_the_source():
    source = random_image(1, 45, 70, 4)
    built = dp.build(source, panel_width=0, policy="crop")
    edited = dp.split(torch.zeros_like(built.image), built.layout).edited
    assert edited.shape == source.shape and torch.equal(edited[..., 3], source[..., 3])
    assert not edited[:, 6:38, 3:67, :3].any()
    assert torch.equal(edited[:, :6], source[:, :6]) and torch.equal(edited[:, :, 67:], source[:, :, 67:])


def test_changed_keeps_every_unchanged_pixel_and_takes_every_changed_one():
    source = random_image(1, 64, 64, 3)
    built = dp.build(source, panel_width=64)
    noise = 0.02 * (random_image(1, 64, 128, 3, seed=5) - 0.5)
    decoded = (built.image + noise).clone()
    decoded[:, 20:40, 64 + 10 : 64 + 30] = 1 - decoded[:, 20:40, 64 + 10 : 64 + 30].round()
    edited = dp.split(decoded, built.layout, paste="changed").edited
    changed = torch.zeros(64, 64, dtype=torch.bool)
    changed[20:40, 10:30] = True
    assert torch.equal(edited[:, ~changed], source[:, ~changed])
    assert torch.equal(edited[:, changed], decoded[:, :, 64:][:, changed])


def test_changed_is_exact_outside_at_another_scale_too():
    source = random_image(1, 96, 128, 3)
    built = dp.build(source, panel_width=64)
    decoded = built.image.clone()
    decoded[:, 16:32, 64 + 16 : 64 + 32] = 1 - decoded[:, 16:32, 64 + 16 : 64 + 32].round()
    edited = dp.split(decoded, built.layout, paste="changed").edited
    outside = torch.ones(96, 128, dtype=torch.bool)
    outside[32:64, 32:64] = False
    assert torch.equal(edited[:, outside], source[:, outside])
    assert float((edited - source)[:, 40:56, 40:56].abs().amax(dim=-1).min()) > 0.1


def test_a_larger_source_of_the_same_aspect_is_returned_at_its_own_size():
    small, large = smooth(32, 48), smooth(128, 192)
    built = dp.build(small, panel_width=48)
    region = torch.zeros(1, 32, 48)
    region[:, :16] = 1
    edited = dp.split(built.image, built.layout, source=large, mask=region).edited
    assert edited.shape == large.shape and torch.equal(edited[:, 64:], large[:, 64:])


def test_a_diptych_that_was_upscaled_is_read_in_proportion():
    source = smooth(64, 64)
    built = dp.build(source, panel_width=32, policy="pad")
    twice = dp.pixels.resize_image(built.image, 64, 128)
    edited = dp.split(twice, built.layout).edited
    assert edited.shape == source.shape
    assert float((edited - source)[:, 4:-4, 4:-4].abs().max()) < 0.01  # scaling the whole mixes the seam


def test_a_mask_given_to_split_limits_what_returns_though_the_model_saw_the_whole_panel():
    source, region = random_image(1, 32, 32, 3), torch.zeros(32, 32)
    region[4:9, 4:9] = 1
    built = dp.build(source, panel_width=32)
    assert bool((built.mask[:, :, 32:] == 1).all())
    edited = dp.split(torch.ones_like(built.image), built.layout, mask=region).edited
    assert torch.equal(edited[:, region == 0], source[:, region == 0])
    assert bool((edited[:, region == 1] == 1).all())


def test_half_precision_and_single_images_are_taken():
    source = random_image(33, 40, 3).half()
    edited = dp.split(dp.build(source, panel_width=0, policy="pad")).edited
    assert edited.dtype == torch.float32 and torch.equal(edited[0], source.float())


def test_layouts_compare_by_geometry_and_cannot_be_changed():
    one, two = (dp.build(random_image(1, 64, 32, 3, seed=s)).layout for s in (1, 2))
    assert one == two and hash(one) == hash(two)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.side = "left"


def test_nothing_given_is_written_to():
    source, region = random_image(1, 40, 50, 4), random_image(1, 40, 50)
    kept = source.clone(), region.clone()
    for paste in dp.PASTE:
        for policy in dp.geometry.POLICIES:
            built = dp.build(source, "x", edit_mask=region, policy=policy, panel_width=32, second="gray")
            image = built.image.clone()
            dp.split(built.image, built.layout, source=source, paste=paste, feather=3, grow=2)
            assert torch.equal(built.image, image)
    assert torch.equal(source, kept[0]) and torch.equal(region, kept[1])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda b: dp.build(random_image(1, 32, 32, 3), side="middle"), "side is 'middle'"),
        (lambda b: dp.build(random_image(1, 32, 32, 3), second="white"), "second is 'white'"),
        (lambda b: dp.build(random_image(1, 32, 32, 3), policy="fit"), "policy is 'fit'"),
        (lambda b: dp.build(random_image(1, 32, 32, 3), panel_width=100), "panel_width is 100"),
        (lambda b: dp.build(random_image(1, 32, 32, 3), "x", template="a cat"), "template"),
        (lambda b: dp.split(b.image, b.layout, paste="some"), "paste is 'some'"),
        (lambda b: dp.split(b.image, b.layout, paste="mask"), "no mask"),
        (lambda b: dp.split(b.image[:, :, :32], b.layout), "diptych is 32x32"),
        (lambda b: dp.split(b.image, b.layout, source=random_image(1, 32, 64, 3)), "source is 64x32"),
        (lambda b: dp.split(b.image), "layout is missing"),
        (lambda b: dp.split(b.image, b.layout, paste="changed", threshold=0), "threshold is 0"),
        (lambda b: dp.split(b.image, dataclasses.replace(b.layout, source=None), paste="changed"), "source"),
    ],
)
def test_what_cannot_be_is_one_clear_sentence(call, words):
    built = dp.build(random_image(1, 32, 32, 3), panel_width=32)
    with pytest.raises(ValueError) as error:
        call(built)
    assert words in str(error.value) and "\n" not in str(error.value)
