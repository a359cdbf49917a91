"""A canvas has the room asked for, its mask says exactly what is unknown, and paste-back undoes it."""

from __future__ import annotations

import math

import pytest
import torch
from comfyui_diptych.models.outpaint import crop_context, expand, fill, paste_back
from hypothesis import given, settings
from hypothesis import strategies as st

AMOUNT = st.integers(-12, 40)


def photo(height=48, width=64, batch=1, channels=3, seed=0):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


def noise_like(canvas):
    return torch.rand(canvas.shape, generator=torch.Generator().manual_seed(9))


@settings(max_examples=60, deadline=None)
@given(AMOUNT, AMOUNT, AMOUNT, AMOUNT, st.sampled_from([1, 8, 16, 64]), st.integers(0, 99))
def test_every_known_pixel_comes_back_and_the_size_is_what_was_asked(
    left, top, right, bottom, multiple, seed
):
    image = photo(29, 37, 2, 4, seed)
    canvas, mask, layout = expand(
        image, left=left, top=top, right=right, bottom=bottom, multiple=multiple, mask=None
    )
    assert canvas.shape[1] % multiple == canvas.shape[2] % multiple == 0
    assert canvas.shape[:3] == mask.shape and canvas.shape[3] == 3
    finished = paste_back(noise_like(canvas), image, layout, mask)
    assert finished.shape == (2, 29 + top + bottom, 37 + left + right, 4)
    y, x = max(-top, 0), max(-left, 0)
    kept = image[:, y : 29 + min(bottom, 0), x : 37 + min(right, 0)]
    y, x = max(top, 0), max(left, 0)
    assert torch.equal(finished[:, y : y + kept.shape[1], x : x + kept.shape[2]], kept)
    assert int(mask[0].sum()) == canvas[0, ..., 0].numel() - kept[0, ..., 0].numel()
    assert torch.equal(finished, paste_back(noise_like(canvas), image, layout))


def test_rounding_goes_outwards_and_keeps_the_image_where_the_layout_says():
    canvas, mask, layout = expand(photo(100, 371), left=128, multiple=64)
    assert canvas.shape == (1, 128, 512, 3) and layout.finished_size == (100, 499)
    assert mask[0, 0].sum() == 141 and mask[0, :, 200].sum() == 28  # mk2's 141, and 28 rows below
    canvas, mask, layout = expand(photo(64, 371), left=60, right=30, multiple=64)
    assert canvas.shape[2] == 512 and int(mask[0, 0, :100].sum()) == 60 + 51 * 60 // 90


@pytest.mark.parametrize(
    "amounts, unit, size",
    [
        ({"left": 3, "top": 2}, "cells", (64, 88)),
        ({"right": 0.5, "bottom": 0.25}, "fraction", (60, 96)),
        ({"left": -0.25}, "fraction", (48, 48)),
        ({"left": 2.0, "right": 2.0}, "aspect", (48, 96)),
        ({"left": 2.0, "right": 2.0, "top": 2.0}, "aspect", (48, 96)),
        ({"top": 1.0, "bottom": 1.0, "left": 1.0}, "aspect", (64, 64)),
        ({"right": 100, "bottom": 70}, "size", (70, 100)),
        ({"left": 50, "right": 50}, "size", (48, 50)),
    ],
)
def test_units(amounts, unit, size):
    _, mask, layout = expand(photo(), **amounts, unit=unit, multiple=1)
    assert layout.finished_size == size == tuple(mask.shape[1:])


def test_mosaic_outpaints_boxes():
    """sd-webui-mosaic-outpaint's 100x80 cases: expand half a side, 15 % of the side joins the hole."""
    for sides, size, box in (
        (["right"], (80, 150), (0, 0, 85, 80)),
        (["left"], (80, 150), (65, 0, 150, 80)),
        (["left", "top", "right", "bottom"], (160, 200), (65, 52, 135, 108)),
        (["left", "bottom"], (120, 150), (65, 0, 150, 68)),
    ):
        amounts = dict.fromkeys(sides, 0.5)
        _, mask, _ = expand(photo(80, 100), **amounts, unit="fraction", multiple=1, overlap=0.15)
        rows, columns = (mask[0] == 0).any(1).nonzero(), (mask[0] == 0).any(0).nonzero()
        found = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        assert (tuple(mask.shape[1:]), found) == (size, box)
        assert int((mask == 0).sum()) == (box[2] - box[0]) * (box[3] - box[1])


def feather_by_loop(height, width, sides, feather):
    """ComfyUI's ImagePadForOutpaint, written from its formula, pixel by pixel."""
    mask = torch.zeros(height, width)
    for y in range(height):
        for x in range(width):
            distances = {"left": x, "top": y, "right": width - x, "bottom": height - y}
            nearest = min((distances[side] for side in sides), default=math.inf)
            mask[y, x] = max((feather - nearest) / feather, 0) ** 2
    return mask


@pytest.mark.parametrize("sides", [["left"], ["left", "top"], ["left", "top", "right", "bottom"]])
@pytest.mark.parametrize("feather", [1, 7, 30])
def test_feather_is_the_known_formula_with_its_corners(sides, feather):
    image = photo(24, 30)
    _, mask, _ = expand(image, **dict.fromkeys(sides, 16), feather=feather, multiple=1)
    y, x = 16 * ("top" in sides), 16 * ("left" in sides)
    inside = mask[0, y : y + 24, x : x + 30]
    assert torch.allclose(inside, feather_by_loop(24, 30, sides, feather), atol=1e-6)
    assert mask.dtype == torch.float32 and float(mask.max()) == 1


def test_overlap_then_feather():
    _, mask, layout = expand(photo(), right=16, overlap=8, feather=4, multiple=1)
    row = mask[0, 0]
    assert torch.equal(row[:52], torch.zeros(52)) and torch.equal(row[56:], torch.ones(24))
    assert torch.allclose(row[52:56], torch.tensor([0, 1 / 16, 4 / 16, 9 / 16]))


def test_masks_per_item_and_gray_images():
    masks = torch.zeros(3, 48, 64)
    masks[1, 5:9, 10:20] = 1
    canvas, mask, layout = expand(photo(channels=1), left=16, mask=masks, multiple=1)
    assert canvas.shape == (3, 48, 80, 3)
    assert torch.equal(mask[:, :, 16:], masks) and bool((mask[:, :, :16] == 1).all())
    assert float(masks.sum()) == 40
    assert torch.equal(canvas[0, :, 16:, 0], canvas[2, :, 16:, 2])


@pytest.mark.parametrize(
    "image, options, words",
    [
        (photo(), {"left": -40, "right": -24}, "left is -40 and right is -24 px"),
        (photo(1, 1), {"left": 8}, "image is 1x1"),
        (photo() * float("nan"), {"left": 8}, "image holds NaN"),
        (photo(), {"left": float("nan")}, "left is nan"),
        (photo(), {"left": 0.5}, "left is 0.5 px"),
        (photo(), {"left": 8, "unit": "inch"}, "unit is 'inch'"),
        (photo(), {"left": 8, "multiple": 0}, "multiple is 0"),
        (photo(), {"left": 8, "overlap": 64}, "overlap is 64"),
        (photo(), {"left": 8, "overlap": 32, "right": 1}, "overlap is 32"),
        (photo(), {"left": 8, "feather": -1}, "feather is -1"),
        (photo(), {"left": 1.0, "unit": "aspect"}, "give the number to top or bottom"),
        (photo(), {"left": 1.0, "top": 2.0, "unit": "aspect"}, "one width / height"),
        (photo(), {"left": 90, "right": 80, "unit": "size"}, "left is 90 and right is 80"),
        (photo(), {"left": 8, "mask": torch.ones(1, 8, 8)}, "mask is 8x8 but the image is 64x48"),
    ],
)
def test_bad_input_is_one_sentence(image, options, words):
    with pytest.raises(ValueError, match=".") as error:
        expand(image, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def gradient(height, width):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((x / 300, y / 300, (x + y) / 600), dim=-1)[None] + 0.1


@pytest.mark.parametrize("sides", [{"right": 64}, {"left": 48, "top": 32, "right": 16, "bottom": 80}])
@pytest.mark.parametrize("feather", [0, 8])
def test_a_shift_of_six_steps_leaves_no_seam(sides, feather):
    """+6/255 over the whole result; at the seam the finished gradient is at most 1/255 from the true one."""
    sides = dict.fromkeys(("left", "top", "right", "bottom"), 0) | sides
    truth = gradient(96 + sides["top"] + sides["bottom"], 128 + sides["left"] + sides["right"])
    image = truth[:, sides["top"] : sides["top"] + 96, sides["left"] : sides["left"] + 128]
    canvas, mask, layout = expand(image, **sides, multiple=1)
    shifted = truth + 6 / 255
    assert float((paste_back(shifted, image, layout) - truth).abs().max()) > 5.9 / 255
    finished = paste_back(shifted, image, layout, mask, match_colour=True, feather=feather)
    assert float((finished - truth).abs().max()) <= 1 / 255
    for axis in (1, 2):  # the step between neighbours, over the gradient's own
        step = (finished.diff(dim=axis) - truth.diff(dim=axis)).abs().max()
        assert float(step) <= 1 / 255
    known = mask[0] == 0
    inner = torch.nn.functional.max_pool2d(mask[:, None], 2 * feather + 1, 1, feather)[0, 0] == 0
    assert torch.equal(finished[0][inner & known], truth[0][inner & known])


def test_matching_follows_a_shift_that_changes_along_the_seam():
    truth = gradient(128, 192)
    image = truth[:, :, :128]
    canvas, mask, layout = expand(image, right=64, multiple=1)
    shift = torch.linspace(-8, 8, 128)[None, :, None, None] / 255
    finished = paste_back(truth + shift, image, layout, mask, match_colour=True)
    assert float((finished - truth)[:, :, 128].abs().max()) <= 2 / 255  # of up to 8


def test_what_the_model_drew_anew_beside_the_seam_is_no_shift_of_colour():
    truth = gradient(128, 192) * 0.5
    image = truth[:, :, :128]
    canvas, mask, layout = expand(image, right=64, multiple=1)
    result = truth + 6 / 255
    result[:, 50:70, 115:150] = 0.9
    finished = paste_back(result, image, layout, mask, match_colour=True)
    away = torch.ones(128, dtype=torch.bool)
    away[50:70] = False
    assert float((finished - truth)[:, away, 128:].abs().max()) <= 1 / 255
    assert float((finished[:, 50:70, 128:150] - 0.9).abs().max()) <= 7 / 255


def test_feather_reaches_no_farther_than_it_says():
    image = photo(60, 80)
    mask = torch.zeros(1, 60, 80)
    mask[:, 20:40, 30:50] = 1
    canvas, mask, layout = expand(image, mask=mask, multiple=1)
    finished = paste_back(torch.ones_like(canvas), image, layout, mask, feather=6)
    touched = (finished != image).any(dim=-1)[0]
    away = torch.cdist(touched.nonzero().float(), mask[0].nonzero().float()).amin(dim=1)
    assert 5 < float(away.max()) <= 6
    assert torch.equal(finished[mask[..., None].expand_as(finished) == 1], torch.ones(400 * 3))


def test_alpha_returns_and_new_area_is_opaque():
    image = photo(channels=4)
    canvas, mask, layout = expand(image, left=16)
    finished = paste_back(canvas, image, layout, mask)
    assert torch.equal(finished[:, :, 16:], image) and bool((finished[:, :, :16, 3] == 1).all())


def test_paste_back_takes_masks_of_every_size_that_it_knows_and_is_never_gray():
    image = photo(40, 50)
    canvas, mask, layout = expand(image, left=10, top=4, multiple=16)
    result = noise_like(canvas)
    expected = paste_back(result, image, layout, mask)
    assert torch.equal(paste_back(result, image, layout, layout.mask), expected)
    assert torch.equal(paste_back(result, image, layout, torch.zeros(40, 50)), expected)
    assert torch.equal(paste_back(result, image, layout, torch.zeros(1, 44, 60)), expected)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"original": photo(40, 40)}, "original is 40x40"),
        ({"result": photo(90, 30)}, "result is 30x90"),
        ({"mask": torch.ones(1, 5, 6)}, "mask is 6x5"),
        ({"layout": None}, "layout is missing"),
        ({"result": torch.full((1, 48, 80, 3), float("nan"))}, "result holds"),
        ({"original": photo(batch=2), "join": True}, "original has 2 items"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(change, words):
    image = photo()
    canvas, mask, layout = expand(image, left=16)
    given = {"result": canvas, "original": image, "layout": layout, "mask": mask} | change
    with pytest.raises(ValueError) as error:
        paste_back(**given)
    assert words in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1.0, 1.5, 3.0]),
    st.sampled_from([None, 32, 64, 100]),
    st.sampled_from([0, 3]),
    st.booleans(),
)
def test_a_context_crop_changes_nothing_outside_its_mask(seed, context, size, blend, fill_holes):
    generator = torch.Generator().manual_seed(seed)
    height, width = torch.randint(20, 90, (2,), generator=generator).tolist()
    image = torch.rand(2, height, width, 3, generator=generator)
    mask = torch.zeros(2, height, width)
    for item in mask:
        y, x = (int(torch.randint(0, side, (), generator=generator)) for side in (height, width))
        item[y : y + int(torch.randint(1, 30, (), generator=generator)), x : x + 11] = 1
    crop, crop_mask, layout = crop_context(
        image, mask, context=context, size=size, blend=blend, fill_holes=fill_holes
    )
    assert crop.shape[:3] == crop_mask.shape and crop.shape[1] % 16 == crop.shape[2] % 16 == 0
    assert bool((crop_mask.flatten(1).amax(1) == 1).all())
    finished = paste_back(torch.ones_like(crop), image, layout)
    assert finished.shape == image.shape
    assert torch.equal(finished[mask == 0], image[mask == 0])
    assert bool((finished[mask == 1] != image[mask == 1]).any())
    if blend == 0:
        assert torch.allclose(finished[mask == 1], torch.ones(()), atol=1e-5)


def test_a_crop_without_resampling_is_a_round_trip_bit_for_bit():
    image = photo(100, 120)
    mask = torch.zeros(1, 100, 120)
    mask[:, 40:60, 50:70] = 1
    crop, crop_mask, layout = crop_context(image, mask, size=None, context=1.6)
    assert crop.shape == (1, 32, 32, 3) and float(crop_mask.sum()) == 400
    assert torch.equal(paste_back(crop, image, layout), image)
    finished = paste_back(torch.zeros_like(crop), image, layout, crop_mask)
    assert torch.equal(finished == 0, (mask == 1)[..., None].expand_as(finished))


def test_several_crops_go_into_one_image():
    image = photo(80, 120)
    mask = torch.zeros(3, 80, 120)
    for item, x in zip(mask, (5, 50, 95), strict=True):
        item[20 : 20 + x // 2, x : x + 15] = 1
    crops, _, layout = crop_context(image, mask, size=None)
    assert len(crops) == 3
    finished = paste_back(torch.zeros_like(crops), image, layout, join=True)
    everywhere = mask.amax(dim=0) == 1
    assert finished.shape == image.shape
    assert bool((finished[0][everywhere] == 0).all())
    assert torch.equal(finished[0][~everywhere], image[0][~everywhere])


def test_crop_size_is_near_the_models_and_keeps_the_aspect():
    mask = torch.zeros(1, 900, 1600)
    mask[:, 300:500, 200:900] = 1
    crop, _, layout = crop_context(photo(900, 1600), mask, size=512)
    height, width = crop.shape[1:3]
    assert abs(height * width / 512**2 - 1) < 0.12
    spot = layout.spots[0]
    assert abs(height / width / (spot.height / spot.width) - 1) < 0.02
    assert spot.height >= 300 and spot.width >= 1050


def test_islands_in_the_hole_are_filled_and_faint_paint_is_dropped():
    image = photo(64, 64)
    mask = torch.zeros(1, 64, 64)
    mask[:, 10:40, 10:40] = 1
    mask[:, 20:30, 20:30] = 0
    mask[:, 60, 60] = 0.05
    crop, crop_mask, layout = crop_context(image, mask, size=None, context=1.0, fill_holes=True)
    assert crop.shape[1:3] == (32, 32) and int(crop_mask.sum()) == 900
    _, crop_mask, _ = crop_context(image, mask, size=None, context=1.0)
    assert int(crop_mask.sum()) == 800


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 16), st.integers(1, 16), st.integers(0, 10**6))
def test_enclosed_is_binary_fill_holes(height, width, seed):
    from comfyui_diptych.models.outpaint.crop import enclosed
    from scipy.ndimage import binary_fill_holes

    hole = torch.rand(1, height, width, generator=torch.Generator().manual_seed(seed)) < 0.6
    assert torch.equal(enclosed(hole)[0], torch.from_numpy(binary_fill_holes(hole[0].numpy())))


@pytest.mark.parametrize(
    "image, mask, options, words",
    [
        (photo(), torch.zeros(1, 48, 64), {}, "mask is empty"),
        (photo(), torch.eye(48, 64)[None] * torch.tensor([1.0, 0.0])[:, None, None], {}, "empty in item 1"),
        (photo(), torch.ones(1, 64, 48), {}, "mask is 48x64 but the image is 64x48"),
        (photo(), torch.full((1, 48, 64), float("nan")), {}, "mask holds"),
        (photo(1, 1), torch.ones(1, 1, 1), {}, "image is 1x1"),
        (photo(), torch.ones(1, 48, 64), {"context": 0.5}, "context is 0.5"),
        (photo(), torch.ones(1, 48, 64), {"size": -3}, "size is -3"),
    ],
)
def test_what_cannot_be_cropped_is_one_sentence(image, mask, options, words):
    with pytest.raises(ValueError) as error:
        crop_context(image, mask, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_nothing_given_is_written_to():
    image, mask = photo(), torch.zeros(1, 48, 64)
    mask[:, 3:9, 4:30] = 1
    before = image.clone(), mask.clone()
    canvas, hole, layout = expand(image, left=16, mask=mask, multiple=1)
    kept = canvas.clone(), hole.clone()
    for how in ("edge", "mirror", "blur", "noise", "mosaic", "perlin"):
        fill(canvas, hole, how)
    paste_back(canvas, image, layout, hole, feather=3, match_colour=True)
    crop, crop_mask, at = crop_context(image, mask, blend=2, size=None)
    paste_back(crop * 0, image, at)
    assert torch.equal(image, before[0]) and torch.equal(mask, before[1])
    assert torch.equal(canvas, kept[0]) and torch.equal(hole, kept[1])
