"""Outpainting methods: webui's geometry to the pixel, and what every method promises of known pixels."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.models.geometry import Box
from comfyui_diptych.models.outpaint import METHODS, Options, expand, fill, outpaint
from comfyui_diptych.models.outpaint.methods import gaussian
from comfyui_diptych.models.outpaint.passes import mk2_passes, poor_mans_plan, rounded


def sides(**given) -> dict[str, int]:
    return {"left": 0, "right": 0, "top": 0, "bottom": 0} | given


ALL = dict.fromkeys(("left", "right", "top", "bottom"), 128)

# (width, height), amounts, (width, height) afterwards; process size 512 x 512. Ran in webui's own script.
MK2 = [
    ((371, 681), {"left": 128}, (512, 681)),
    ((512, 681), {"left": 128}, (640, 681)),
    ((371, 681), {"left": 256}, (640, 681)),
    ((640, 681), {"left": 256}, (896, 681)),
    ((512, 512), ALL, (768, 768)),
    ((512, 512), {"top": 64}, (512, 576)),
    ((512, 512), {"right": 8}, (576, 512)),
]


@pytest.mark.parametrize("size, amounts, after", MK2)
def test_mk2_ends_at_the_golden_sizes(size, amounts, after):
    steps = mk2_passes((size[1], size[0]), sides(**amounts))
    assert steps[-1].size == (after[1], after[0])


def test_mk2s_first_pass_is_golden():
    (step,) = mk2_passes((681, 371), sides(left=128))
    assert (step.canvas, step.placed) == ((704, 512), Box(0, 141, 681, 371))
    assert step.window == Box(0, 0, 704, 512)
    assert step.keep == Box(0, 149, 682, 512 - 149)  # (149, 0) to (511, 681), both inside
    assert (step.keep_latent.top, step.keep_latent.left) == (0, 157)


def test_mk2_takes_four_passes_of_the_golden_windows():
    steps = mk2_passes((512, 512), ALL)
    assert [step.side for step in steps] == ["left", "right", "top", "bottom"]
    windows = [(step.window.width, step.window.height) for step in steps]
    assert windows == [(512, 512), (512, 512), (768, 512), (768, 512)]
    assert [step.window.left for step in steps] == [0, 256, 0, 0]
    assert [step.window.top for step in steps] == [0, 0, 0, 256]


def test_only_axes_that_grow_are_rounded_and_shares_stay():
    assert rounded(sides(left=128), (681, 371)) == sides(left=141)
    assert rounded(sides(left=30, right=10), (64, 64)) == sides(left=48, right=16)


def test_poor_mans_tiles_are_golden():
    plan = poor_mans_plan((512, 512), ALL)
    assert plan.canvas == (768, 768) and plan.overlap == 128
    assert [(tile.left, tile.top) for tile in plan.tiles] == [(0, 0), (256, 0), (0, 256), (256, 256)]
    assert plan.painted == plan.tiles
    wide = poor_mans_plan((512, 1024), sides(left=128, right=128))
    assert wide.canvas == (512, 1280)
    assert [tile.left for tile in wide.painted] == [wide.tiles[0].left, wide.tiles[-1].left] == [0, 768]
    assert len(wide.tiles) > 2
    old = poor_mans_plan((681, 371), sides(left=128))
    assert old.canvas == (681, 512)  # webui: 704, with 23 black rows that are kept


def test_poor_mans_insets_are_golden():
    plan = poor_mans_plan((512, 512), sides(left=128), mask_blur=4)
    assert (plan.keep.left, plan.keep_latent.left) == (128 + 8, 128 + 2)


@pytest.mark.parametrize("amount", [600, 2000])
def test_poor_mans_overlap_never_reaches_its_tile(amount):
    plan = poor_mans_plan((512, 512), sides(right=amount))
    covered = torch.zeros(plan.canvas, dtype=torch.bool)
    for tile in plan.tiles:
        assert tile.left + tile.width <= plan.canvas[1]
        covered[tile.rows, tile.columns] = True
    assert covered.all() and plan.overlap == 256


MOSAIC = [  # amounts as fractions of 100 x 80, canvas, and the box that is kept (left, top, right, bottom)
    ({"right": 50}, (150, 80), (0, 0, 85, 80)),
    ({"left": 50}, (150, 80), (65, 0, 150, 80)),
    ({"left": 50, "right": 50, "top": 40, "bottom": 40}, (200, 160), (65, 52, 135, 108)),
    ({"bottom": 40, "left": 50}, (150, 120), (65, 0, 150, 68)),
]


@pytest.mark.parametrize("amounts, canvas, keep", MOSAIC)
def test_mosaic_keeps_the_golden_boxes_and_every_known_pixel(amounts, canvas, keep):
    image, seen = torch.rand(1, 80, 100, 3, generator=torch.Generator().manual_seed(0)), []
    left, top = amounts.get("left", 0), amounts.get("top", 0)

    def paint(piece):
        seen.append(piece)
        return torch.zeros_like(piece.image)

    made = outpaint(paint, image, sides(**amounts), "mosaic", Options(multiple=1))
    (piece,) = seen
    assert tuple(made.shape[1:3]) == (canvas[1], canvas[0])
    rows, columns = (piece.mask[0] == 0).nonzero().unbind(1)
    box = tuple(map(int, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)))
    assert box == keep and len(rows) == (box[2] - box[0]) * (box[3] - box[1])
    inside = (slice(None), slice(keep[1], keep[3]), slice(keep[0], keep[2]))
    original = image[:, keep[1] - top : keep[3] - top, keep[0] - left : keep[2] - left]
    assert torch.equal(made[inside], original)


def test_the_mosaic_of_one_side_has_72_colours():
    image = torch.rand(1, 80, 100, 3, generator=torch.Generator().manual_seed(0))
    canvas, mask, _ = expand(image, right=50, multiple=1)
    filled = fill(canvas, mask, "mosaic")
    assert len(filled[0, :, 100:].reshape(-1, 3).unique(dim=0)) == 72  # 3 x 24


def repaint(piece):
    """A model that shows the image again and paints what it is told to black."""
    keep = (piece.mask < 0.5)[..., None]
    return torch.where(keep, piece.image, torch.zeros_like(piece.image))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch, channels", [(1, 3), (2, 4), (1, 1)])
def test_known_pixels_return_exactly_beyond_the_seam(method, batch, channels):
    image = torch.rand(batch, 75, 83, channels, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.1
    before = image.clone()
    options = Options(window=96, mask_blur=1) if method in ("mk2", "poor man") else Options(window=64)
    made = outpaint(repaint, image, sides(left=20, bottom=10), method, options)
    assert torch.equal(image, before) and torch.isfinite(made).all()
    assert made.shape[0] == batch and made.shape[3] == max(3, channels)
    growth = made.shape[2] - 83
    assert growth == (45 if method in ("mk2", "poor man") else 20)
    seam = 26
    known = image.expand(-1, -1, -1, 3) if channels == 1 else image
    assert torch.equal(made[:, : 75 - seam, growth + seam :], known[:, : 75 - seam, seam:])
    new = made[:, :, : max(growth - seam, 5), :3]
    assert float(new.abs().max()) == 0.0  # all of it is the model's
    if channels == 4:
        assert float(made[:, :75, :growth, 3].min()) == 1.0


def test_mk2_starts_from_matched_noise_and_tells_a_soft_mask():
    image, seen = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2)), []

    def paint(piece):
        seen.append(piece)
        return piece.image

    made = outpaint(paint, image, sides(right=64), "mk2", Options(mask_blur=2, seed=5))
    (piece,) = seen
    canvas, mask = torch.zeros(1, 64, 128, 3), torch.ones(1, 64, 128)
    canvas[:, :, :64], mask[:, :, : 64 - 2 + 1] = image, 0
    assert torch.equal(piece.image, fill(canvas, mask, "noise", seed=5))
    assert torch.equal(piece.mask, gaussian(mask, 0, 8)) and 0 < float(piece.mask[0, 0, 60]) < 1
    assert piece.cells.tolist() == [[[False] * 8 + [True] * 8] * 8]
    assert torch.equal(made, piece.image)


@pytest.mark.parametrize("sigma", [2.0, 8.0, 32.0])
def test_the_blur_is_a_gaussian_cut_at_two_and_a_half_sigma(sigma):
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = (torch.rand(1, 60, 90, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    for axis, sigmas in enumerate(((sigma, 0), (0, sigma))):
        expected = ndimage.gaussian_filter1d(mask[0].numpy(), sigma, axis, mode="mirror", truncate=2.5)
        torch.testing.assert_close(gaussian(mask, *sigmas)[0], torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_a_tile_of_poor_mans_gets_a_seed_of_its_own_and_fades_over_the_one_before():
    image, seeds = torch.zeros(1, 64, 64, 3), []

    def paint(piece):
        seeds.append(piece.seed)
        return torch.full_like(piece.image, float(len(seeds)) / 10)

    made = outpaint(paint, image, sides(right=128), "poor man", Options(window=96, mask_blur=0))
    assert seeds == [0, 1, 2] and made.shape == (1, 64, 192, 3)
    row = made[0, 32, 64:, 0]
    assert bool((row.diff() >= -1e-6).all()) and float(row[-1]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "amounts, method, options, words",
    [
        ({}, "direct", {}, "nothing is to be painted"),
        ({"left": 8}, "webui", {}, "method is 'webui'"),
        ({"left": 8, "top": -8}, "mk2", {}, "top is -8: mk2 does not crop"),
        ({"left": 8}, "mk2", {"fill": "edge"}, "mk2 has its own"),
        ({"left": 8}, "direct", {"fill": "magic"}, "how is 'magic'"),
        ({"left": 8}, "poor man", {"window": 2}, "window is 2"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_before_painting(amounts, method, options, words):
    def paint(piece):
        pytest.fail("it was painted")

    with pytest.raises(ValueError, match=words):
        outpaint(paint, torch.rand(1, 64, 64, 3), sides(**amounts), method, Options(**options))
