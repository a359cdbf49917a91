"""Masks follow one rule, grow by the pixels asked for, and fade without touching what is outside."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.models import pixels
from hypothesis import given, settings
from hypothesis import strategies as st


def brute_distance(mask):
    marked = mask.nonzero().float()
    grid = torch.cartesian_prod(torch.arange(mask.shape[0]), torch.arange(mask.shape[1])).float()
    if not len(marked):
        return torch.full(mask.shape, float("inf"))
    return torch.cdist(grid, marked).amin(dim=1).reshape(mask.shape)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 9), st.integers(0, 1000))
def test_distance_is_euclidean_up_to_its_limit(height, width, limit, seed):
    mask = (torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < 0.1).float()
    expected = brute_distance(mask).clamp(max=limit + 1)
    assert torch.allclose(pixels.distance(mask[None], limit)[0], expected, atol=1e-5)


@pytest.mark.parametrize("radius", [1, 8, 16, 32])
def test_growing_by_n_pixels_grows_by_n_pixels(radius):
    mask = torch.zeros(1, 99, 99)
    mask[:, 49, 49] = 1
    grown = pixels.grow(mask, radius)
    assert grown.sum(dim=2).amax() == grown.sum(dim=1).amax() == 2 * radius + 1
    assert torch.equal(grown, grown.flip(1)) and torch.equal(grown, grown.transpose(1, 2))
    assert torch.equal(pixels.grow(grown, -radius), mask)


def test_shrinking_leaves_the_frame_alone():
    mask = torch.zeros(1, 20, 20)
    mask[:, :, :10] = 1
    assert torch.equal(pixels.grow(mask, -3)[0, 0], torch.tensor([1.0] * 7 + [0.0] * 13))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_inner_ramp_is_zero_outside_and_reaches_one_inside_every_region(width, seed):
    mask = (torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(seed)) < 0.7).float()
    ramp = pixels.inner_ramp(mask, width)
    assert torch.equal(ramp > 0, mask > 0) and float(ramp.max()) <= 1
    if mask.sum():
        assert float(ramp.max()) == 1


def test_inner_ramp_of_a_half_plane_is_linear():
    mask = torch.zeros(1, 8, 40)
    mask[:, :, 20:] = 1
    expected = (torch.arange(40).float() - 19).clamp(0, 5) / 5
    assert torch.allclose(pixels.inner_ramp(mask, 4)[0, 3], expected)


def test_soft_edge_is_half_at_the_edge_and_binarises_to_the_mask():
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:24, 8:24] = 1
    soft = pixels.soft_edge(mask, 6)
    assert 0 < soft[0, 7, 16] < 0.5 < soft[0, 8, 16] < 1
    assert float(soft[0, 7, 16] + soft[0, 8, 16]) == pytest.approx(1)
    assert torch.equal(pixels.binarise(soft), mask)


def test_binarise_takes_a_half_as_repaint_and_nan_as_keep():
    mask = torch.tensor([[0.0, 0.4999, 0.5, 1.0, float("nan")]])
    assert pixels.binarise(mask).tolist() == [[0, 0, 1, 1, 0]]


def test_a_stroke_thinner_than_a_cell_survives():
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 13] = 1
    assert pixels.resize_mask(mask, 16, 16)[0, 5].tolist() == [0, 0, 0, 1] + [0] * 12


@settings(max_examples=80, deadline=None)
@given(*[st.integers(1, 40)] * 4, st.integers(0, 1000))
def test_resizing_a_mask_loses_no_pixel_adds_no_cell_and_mixes_no_value(height, width, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, height, width)
    y, x = (int(torch.randint(side, (1,), generator=generator)) for side in (height, width))
    mask[0, y, x] = float(torch.rand(1, generator=generator)) * 0.9 + 0.1
    resized = pixels.resize_mask(mask, rows, columns)
    assert resized.shape == (1, rows, columns) and resized.max() == mask.max()
    for cells, at, have, want in (
        (resized[0].amax(1), y, height, rows),
        (resized[0].amax(0), x, width, columns),
    ):
        for cell in cells.nonzero()[:, 0].tolist():  # such a cell overlaps the pixel
            assert cell * have < (at + 1) * want and (cell + 1) * have > at * want
    hard = pixels.binarise(pixels.resize_mask(mask, rows, columns))
    assert torch.equal(hard, pixels.resize_mask(pixels.binarise(mask), rows, columns))


def test_on_white_shows_nothing_of_what_is_transparent():
    image = torch.rand(1, 4, 4, 4)
    image[..., 3] = torch.tensor([0.0, 0.5, 1.0, 0.0])
    shown = pixels.on_white(image)
    assert (shown[:, :, [0, 3]] == 1).all() and torch.equal(shown[:, :, 2], image[:, :, 2, :3])
    assert torch.allclose(shown[:, :, 1], image[:, :, 1, :3] / 2 + 0.5)


@pytest.mark.parametrize("have, batch, order", [(1, 3, [0, 0, 0]), (2, 3, [0, 1, 0]), (3, 2, [0, 1])])
def test_batches_repeat_as_in_comfyui(have, batch, order):
    assert pixels.repeat_batch(torch.arange(have), batch).tolist() == order


@pytest.mark.parametrize("shape", [(8, 9), (1, 8, 9), (1, 1, 8, 9), (1, 8, 9, 1)])
def test_every_usual_mask_shape_is_taken(shape):
    assert pixels.as_mask(torch.ones(shape, dtype=torch.bool)).shape == (1, 8, 9)
    assert float(pixels.as_mask(torch.full(shape, 255, dtype=torch.uint8)).max()) == 1


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: pixels.as_image(torch.zeros(1, 8, 8, 2)), "1, 8, 8, 2"),
        (lambda: pixels.as_image(torch.zeros(8, 8)), "image has shape"),
        (lambda: pixels.as_image(torch.zeros(0, 8, 8, 3)), "0, 8, 8, 3"),
        (lambda: pixels.as_image(torch.zeros(1, 8, 8, 3, dtype=torch.uint8)), "uint8"),
        (lambda: pixels.as_image([1]), "list"),
        (lambda: pixels.as_mask(torch.zeros(1, 3, 8, 8)), "mask has shape"),
        (lambda: pixels.as_mask("x", "edit_mask"), "edit_mask is a str"),
    ],
)
def test_a_wrong_tensor_is_one_clear_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "size, to", [((40, 60), (20, 30)), ((40, 60), (90, 30)), ((9, 8), (16, 8)), ((9, 8), (9, 3))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_antialiased_bicubic_clamped(size, to, channels):
    image = torch.rand(2, *size, channels, generator=torch.Generator().manual_seed(0)).round()
    expected = torch.nn.functional.interpolate(image.movedim(-1, 1), to, mode="bicubic", antialias=True)
    resized = pixels.resize_image(image, *to)
    assert torch.allclose(resized, expected.clamp(0, 1).movedim(1, -1), atol=1e-5)


def test_an_image_of_that_size_is_not_resized_nor_clamped():
    image = torch.full((1, 8, 8, 3), 1.5)
    assert pixels.resize_image(image, 8, 8) is image


@pytest.mark.parametrize("take", [pixels.as_image, pixels.as_mask])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_and_infinity_are_refused_wherever_they_come_in(take, value, dtype):
    tensor = torch.zeros(1, 9, 8, 1, dtype=dtype)
    tensor[0, 3, 4] = value
    with pytest.raises(ValueError, match="it holds NaN or infinity"):
        take(tensor, "it")


def test_a_mask_beyond_its_range_counts_as_its_ends():
    assert pixels.as_mask(torch.tensor([[-2.0, 0.25, 3.0]])).tolist() == [[[0, 0.25, 1]]]


def test_an_empty_mask_is_none_each_by_itself():
    assert pixels.painted(None) is None and pixels.painted(torch.zeros(2, 8, 8)) is None
    masks = torch.zeros(3, 8, 8)
    masks[1, 2, 2] = 0.6
    assert torch.equal(pixels.painted(masks)[1], masks[1])
    assert bool((pixels.painted(masks)[[0, 2]] == 1).all()) and not masks[0].any()
    with pytest.raises(ValueError, match="edit_mask 1 of 3 is empty"):
        pixels.painted(masks, "edit_mask", needed=True)
    masks[2] = 0.4
    with pytest.raises(ValueError, match="edit_mask 3 of 3 is nowhere 0.5 or more .at most 0.4."):
        pixels.painted(masks, "edit_mask")


def test_growing_and_fading_farther_than_the_image_takes_no_longer():
    mask = torch.zeros(1, 12, 20)
    mask[:, 4:6, 3:9] = 1
    assert bool(pixels.grow(mask, 10**6).all()) and not pixels.grow(mask, -(10**6)).any()
    assert torch.equal(pixels.inner_ramp(mask, 10**6) > 0, mask > 0)
    assert float(pixels.inner_ramp(mask, 10**6).max()) == 1
