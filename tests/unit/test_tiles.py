"""Tiles: glid's order is exact, outward always knows something, the loop keeps what it was told to keep."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.models.glid import DIRECTIONS, glid_canvas, guided, image_embed, known_from_mask, sides
from comfyui_diptych.models.outpaint import expand
from comfyui_diptych.samplers import tiles
from hypothesis import assume, given, settings
from hypothesis import strategies as st

# Canvas and offset per direction, and the tile lists: glid-3-xl-stable's own lines run with a stub sampler.
GEOMETRY = {  # direction: (extra rows, extra columns, row offset, column offset)
    "expand": (64, 64, 32, 32),
    "wider": (0, 64, 0, 32),
    "taller": (64, 0, 32, 0),
    "left": (0, 32, 0, 32),
    "right": (0, 32, 0, 0),
    "top": (32, 0, 32, 0),
    "bottom": (32, 0, 0, 0),
    "": (0, 0, 0, 0),
}
RING = [(0, 0), (32, 0), (64, 0), (0, 32), (64, 32), (0, 64), (32, 64), (64, 64)]
GOLDEN = [  # height, width, direction, tiles (x, y), known cells
    (64, 64, "left", [(0, 0)], [2048]),
    (64, 64, "right", [(32, 0)], [2048]),
    (64, 64, "top", [(0, 0)], [2048]),
    (64, 64, "bottom", [(0, 32)], [2048]),
    (64, 64, "wider", [(0, 0), (64, 0)], [2048, 2048]),
    (64, 64, "taller", [(0, 0), (0, 64)], [2048, 2048]),
    (64, 64, "expand", RING, [1024, 3072, 2048, 3072, 3072, 2048, 3072, 3072]),
    (85, 64, "left", [(0, 0), (0, 21)], [2048, 3424]),
    (85, 64, "right", [(32, 0), (32, 21)], None),
    (85, 64, "top", [(0, 0)], None),
    (85, 64, "bottom", [(0, 53)], None),
    (85, 64, "wider", [(0, 0), (64, 0), (0, 21), (64, 21)], [2048, 2048, 3424, 3424]),
    (85, 64, "taller", [(0, 0), (0, 64), (0, 85)], [2048, 3392, 2752]),
    (85, 64, "expand", [*RING, (0, 85), (32, 85), (64, 85)], None),
    (64, 128, "top", [(0, 0), (32, 0), (64, 0)], None),
    (64, 128, "right", [(96, 0)], None),
    (64, 128, "wider", [(0, 0), (128, 0)], None),
    (96, 160, "left", [(0, 0), (0, 32)], None),
    (96, 160, "bottom", [(0, 64), (32, 64), (64, 64), (96, 64)], None),
]
HOLES = [  # canvas (width, height), hole (x, y) to (x, y)
    ((128, 128), (40, 50), (60, 70), [(0, 6)]),
    ((128, 128), (100, 100), (128, 128), [(64, 64)]),
    (
        (192, 128),
        (10, 10),
        (150, 100),
        [(10, 10), (42, 10), (74, 10), (86, 10), (10, 36), (42, 36), (74, 36), (86, 36)],
    ),
]


@pytest.mark.parametrize("size", [(64, 64), (85, 64), (40, 40), (5, 7)])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("amount", [32, 8, 100])
def test_glid_canvas_is_glids(size, direction, amount):
    latent = torch.randn(2, 4, *size)
    canvas, known = glid_canvas(latent, direction, amount)
    rows, columns, y, x = (value * amount // 32 for value in GEOMETRY[direction])
    assert tuple(canvas.shape) == (2, 4, size[0] + rows, size[1] + columns)
    assert known.dtype == torch.bool and tuple(known.shape) == tuple(canvas.shape[2:])
    inside = torch.zeros_like(known)
    inside[y : y + size[0], x : x + size[1]] = True
    assert torch.equal(known, inside)
    assert torch.equal(canvas[:, :, inside], latent.flatten(2))
    assert bool((canvas[:, :, ~inside] == 0).all())


def test_half_and_fractions_are_of_the_axis_itself():
    canvas, _ = glid_canvas(torch.randn(1, 4, 85, 64), "expand", "half")
    assert tuple(canvas.shape[2:]) == (85 + 2 * 42, 64 + 2 * 32)
    assert sides("left", (85, 64), 0.25) == (16, 0, 0, 0)
    image = torch.rand(1, 85, 64, 3)
    pixels, mask, _ = expand(image, **sides("taller", (85, 64), "half")._asdict(), multiple=1)
    assert tuple(pixels.shape) == (1, 85 + 84, 64, 3) and int(mask.sum()) == 84 * 64


@pytest.mark.parametrize("height, width, direction, places, known", GOLDEN)
def test_glid_order_is_golden(height, width, direction, places, known):
    _, seen = glid_canvas(torch.randn(1, 4, height, width), direction)
    plan = tiles.plan(~seen, order="glid")
    assert [(tile.x, tile.y) for tile in plan] == places
    assert all((tile.width, tile.height) == (64, 64) for tile in plan)
    if known:
        assert [tile.known for tile in plan] == known


def test_glid_order_of_a_large_image_has_sixteen_tiles():
    _, seen = glid_canvas(torch.randn(1, 4, 96, 160), "expand")
    assert len(tiles.plan(~seen, order="glid")) == 16


@pytest.mark.parametrize("canvas, start, end, places", HOLES)
def test_glid_order_of_holes_is_golden(canvas, start, end, places):
    unknown = torch.zeros(canvas[1], canvas[0], dtype=torch.bool)
    unknown[start[1] : end[1], start[0] : end[0]] = True
    assert [(tile.x, tile.y) for tile in tiles.plan(unknown, order="glid")] == places


def test_what_glid_paints_from_nothing_is_painted_from_the_image_outwards():
    """Left by 64 cells: glid's first tile is all unknown, the reason why its "half" could not be steered."""
    _, seen = glid_canvas(torch.randn(1, 4, 64, 64), "left", 64)
    assert tiles.plan(~seen, order="glid")[0].known == 0
    plan = tiles.plan(~seen)
    assert [(tile.x, tile.known) for tile in plan] == [(32, 2048), (0, 2048)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["outward", "glid"]), st.sampled_from([32, 16, 12, 5]))
def test_every_unknown_cell_is_sampled_and_outward_always_knows_something(seed, order, stride):
    generator = torch.Generator().manual_seed(seed)
    height, width = torch.randint(32, 110, (2,), generator=generator).tolist()
    if seed % 3:
        unknown = torch.zeros(height, width, dtype=torch.bool)
        for _ in range(seed % 4 + 1):
            y, x = (int(torch.randint(0, side, (), generator=generator)) for side in (height, width))
            unknown[y : y + 40, x : x + 50] = True
    else:
        unknown = torch.rand(height, width, generator=generator) < (0.02, 0.5, 0.98, 1.0)[seed % 4]
    assume(bool(unknown.any()))
    known = ~unknown
    for tile in tiles.plan(unknown, window=32, stride=stride, order=order):
        part = known[tile.rows, tile.columns]
        assert tuple(part.shape) == (tile.height, tile.width) == (32, 32)
        assert int(part.sum()) == tile.known < part.numel()
        if order == "outward":
            assert tile.known > 0 or not bool(known.any())
        part.fill_(True)
    assert bool(known.all())


def test_a_canvas_narrower_than_the_window_gets_tiles_of_its_own_width():
    _, seen = glid_canvas(torch.randn(1, 4, 40, 40), "wider")
    for order in tiles.ORDERS:
        plan = tiles.plan(~seen, order=order)
        assert {(tile.width, tile.height, tile.y) for tile in plan} == {(64, 40, 0)}
        covered = seen.clone()
        for tile in plan:
            covered[tile.rows, tile.columns] = True
        assert bool(covered.all())


@pytest.mark.parametrize(
    "unknown, options, words",
    [
        (torch.zeros(80, 80, dtype=torch.bool), {}, "unknown is empty"),
        (torch.ones(32, 48, dtype=torch.bool), {}, "window is 64 cells but the canvas is only 48x32"),
        (torch.ones(80, 80), {"stride": 65}, "stride is 65"),
        (torch.ones(80, 80), {"stride": 0}, "stride is 0"),
        (torch.ones(80, 80), {"window": 1}, "window is 1"),
        (torch.ones(80, 80), {"order": "spiral"}, "order is 'spiral'"),
        (torch.ones(2, 80, 80), {}, "unknown has shape (2, 80, 80)"),
        (torch.full((80, 80), float("nan")), {}, "unknown holds NaN"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(unknown, options, words):
    with pytest.raises(ValueError) as error:
        tiles.plan(unknown, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def outpaint(direction="left", amount=64, order="outward", **options):
    latent = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    canvas, known = glid_canvas(latent, direction, amount)
    calls = []

    def paint(context, unknown, noise, tile):
        calls.append((context.clone(), unknown.clone(), noise.clone(), tile))
        return context.mean() + noise

    unknown = ~known
    plan = tiles.plan(unknown, order=order)
    result = tiles.sample(paint, canvas, unknown, plan, **options)
    assert torch.equal(unknown, ~known)  # what is given is not written to
    return canvas, known, result, calls


def test_known_cells_are_kept_bit_for_bit_and_everything_else_is_painted():
    canvas, known, result, calls = outpaint("expand", blend=4)
    assert torch.equal(result[:, :, known], canvas[:, :, known])
    assert bool((result[:, :, ~known] != 0).all())
    first = calls[0]
    assert bool((first[0][:, :, first[1]] == 0).all())  # the unknown is exact zeros
    assert not bool(calls[1][1][:, :].all())


def test_overwrite_is_glids_loop():
    canvas, known, result, calls = outpaint("expand", 32, order="glid", known="overwrite")
    expected, missing = canvas * known, ~known
    for context, unknown, noise, tile in calls:
        at = (slice(None), slice(None), tile.rows, tile.columns)
        assert torch.equal(context, expected[at]) and torch.equal(unknown, missing[tile.rows, tile.columns])
        expected[at] = context.mean() + noise
        missing[tile.rows, tile.columns] = False
    assert torch.equal(result, expected)
    assert not torch.equal(result[:, :, known], canvas[:, :, known])


def test_one_seed_makes_one_noise_for_the_whole_canvas():
    *_, result, calls = outpaint("expand", seed=5)
    again = outpaint("expand", seed=5)[2]
    assert torch.equal(result, again) and not torch.equal(result, outpaint("expand", seed=6)[2])
    field = torch.full(result.shape, float("nan"))
    for _, _, noise, tile in calls:
        part = field[:, :, tile.rows, tile.columns]
        assert torch.equal(part[~part.isnan()], noise[~part.isnan()])
        part.copy_(noise)


def test_what_stands_under_the_hole_is_never_seen():
    canvas, known = glid_canvas(torch.ones(1, 4, 64, 64), "left")
    seen = []
    tiles.sample(
        lambda context, *_: seen.append(context) or context, canvas + 7 * ~known, ~known, tiles.plan(~known)
    )
    assert bool((seen[0][..., :32] == 0).all()) and bool((seen[0][..., 32:] == 1).all())


@pytest.mark.parametrize("known", tiles.KNOWN)
def test_blending_is_a_ramp_without_steps(known):
    """Two tiles painted 0 and 1: with a blend no neighbours differ by more than one step of the ramp."""
    unknown = torch.ones(64, 96, dtype=torch.bool)
    plan = tiles.plan(unknown)
    assert [tile.x for tile in plan] == [0, 32]
    values = iter((0.0, 1.0))
    result = tiles.sample(
        lambda context, *_: context * 0 + next(values),
        torch.zeros(1, 1, 64, 96),
        unknown,
        plan,
        known=known,
        blend=7,
    )
    assert float(result[0, 0, 30].diff().max()) <= 1 / 8 + 1e-6 and float(result[0, 0, 30].diff().min()) >= 0
    assert result[0, 0, 30, 0] == 0 and result[0, 0, 30, -1] == 1


def test_the_loop_reports_and_can_be_stopped():
    canvas, known = glid_canvas(torch.randn(1, 4, 64, 64), "expand")
    plan, seen = tiles.plan(~known), []
    tiles.sample(
        lambda context, *_: context + 1,
        canvas,
        ~known,
        plan,
        callback=lambda i, n, c: seen.append((i, n, c.shape)),
    )
    assert seen == [(i, len(plan), canvas.shape) for i in range(len(plan))]

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiles.sample(stop, canvas, ~known, plan)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"known": "maybe"}, "known is 'maybe'"),
        ({"blend": -1}, "blend is -1"),
        ({"canvas": torch.zeros(1, 4, 64, 64)}, "unknown is 96x64 cells"),
        ({"paint": lambda context, *_: context[..., :3]}, "paint gave (1, 4, 64, 3)"),
    ],
)
def test_what_the_loop_cannot_take_is_one_sentence(change, words):
    canvas, known = glid_canvas(torch.zeros(1, 4, 64, 64), "left")
    given = {"paint": lambda context, *_: context, "canvas": canvas, "unknown": ~known} | change
    with pytest.raises(ValueError) as error:
        tiles.sample(**given, tiles=tiles.plan(~known))
    assert words in str(error.value)


def test_glids_own_conventions():
    canvas, known = glid_canvas(torch.randn(1, 4, 8, 8), "left", 4)
    embed = image_embed(canvas + 1, known)
    assert torch.allclose(embed, (canvas + 1) * 0.18215 * known, atol=1e-6)
    assert bool((embed[:, :, ~known] == 0).all())
    white_left = torch.zeros(8, 12)
    white_left[:, :6] = 1
    assert torch.equal(known_from_mask(white_left, known), known & (white_left > 0))
    assert torch.equal(known_from_mask(white_left, known, "repaint"), known & (white_left == 0))
    assert torch.equal(known_from_mask(torch.ones(8, 12), known), known)
    with pytest.raises(ValueError, match="mask is 8x8 but the canvas has 12x8 cells"):
        known_from_mask(torch.ones(8, 8), known)


@pytest.mark.parametrize("quirk, expected", [(True, [8, 8, 8, 2]), (False, [8, 8, 8, 8])])
def test_glids_guidance_leaves_the_fourth_channel_alone(quirk, expected):
    positive, negative = torch.full((1, 4, 2, 2), 2.0), torch.ones(1, 4, 2, 2)
    assert guided(positive, negative, 7.0, quirk)[0, :, 0, 0].tolist() == expected


@pytest.mark.parametrize(
    "direction, amount, words",
    [
        ("up", 32, "direction is 'up'"),
        ("left", 0, "amount is 0"),
        ("left", 1.5, "amount is 1.5"),
        ("left", "x", "'x'"),
    ],
)
def test_bad_directions_and_amounts(direction, amount, words):
    with pytest.raises(ValueError) as error:
        glid_canvas(torch.zeros(1, 4, 8, 8), direction, amount)
    assert words in str(error.value)
