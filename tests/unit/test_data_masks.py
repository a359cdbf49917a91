"""Random masks: binary, seeded, never empty, and each kind shaped as its name says."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.training.data import masks
from hypothesis import given, settings
from hypothesis import strategies as st


def drawn(kind, seed=0, batch=64, height=48, width=80):
    return masks.random_masks(
        batch, height, width, kinds=[kind], generator=torch.Generator().manual_seed(seed)
    )


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(masks.KINDS),
    seed=st.integers(0, 2**31),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
)
def test_masks_are_binary_and_repaint_something_but_not_everything(kind, seed, height, width):
    mask = drawn(kind, seed, 4, height, width)
    assert mask.shape == (4, height, width) and mask.dtype == torch.float32
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    share = mask.mean((1, 2))
    if kind == "full":
        assert (share == 1).all()
    elif kind == "glid":
        assert (share > 0).all()
    else:
        assert ((share >= 0.01) & (share <= 0.95)).all()


def test_the_same_seed_gives_the_same_masks():
    one, two = (masks.random_masks(16, 32, 32, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, masks.random_masks(16, 32, 32, generator=torch.Generator().manual_seed(4)))


def test_blurred_noise_covers_the_share_that_was_drawn_for_it():
    mask = masks.noise(400, 32, 32, torch.Generator().manual_seed(0)).float().mean((1, 2))
    assert abs(mask.mean() - 0.45) < 0.03  # uniform over 0.1..0.8
    assert mask.min() > 0.09 and mask.max() < 0.81


def test_outpainting_masks_are_one_band_at_one_side():
    sides = set()
    for mask in drawn("half"):
        rows, columns = mask.all(1), mask.all(0)
        assert bool(rows.any()) != bool(columns.any())
        band = rows if rows.any() else columns
        assert torch.equal(mask, (band[:, None] if rows.any() else band[None]).float().expand_as(mask))
        assert band[0] != band[-1] and int(band.float().diff().abs().sum()) == 1
        sides.add((bool(rows.any()), bool(band[0])))
    assert len(sides) == 4


def test_rectangles_have_straight_edges_and_ellipses_do_not():
    def corner_fill(mask):  # share of the bounding box that is painted
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        return mask[rows[0, 0] : rows[-1, 0] + 1, columns[0, 0] : columns[-1, 0] + 1].mean()

    def largest(kind):
        return max(corner_fill(mask.float()) for mask in drawn(kind) if mask.mean() > 0.05)

    assert largest("rectangles") == 1
    assert largest("ellipses") < 0.95


def test_kinds_are_dealt_evenly_and_unknown_ones_are_refused():
    dealt = masks.random_masks(
        600, 16, 16, kinds=["full", "half"], generator=torch.Generator().manual_seed(0)
    )
    assert abs((dealt.mean((1, 2)) == 1).float().mean() - 0.5) < 0.07
    with pytest.raises(ValueError, match="blob.*choose from noise"):
        masks.random_masks(1, 16, 16, kinds=["blob"])
