"""The masks of glid's and DreamBooth's inpainting trainings: their shares and boxes, as measured there."""

from __future__ import annotations

import random

import pytest
import torch
from comfyui_diptych.training.data import masks, published_masks


@pytest.fixture(scope="module")
def glid():
    """10,000 masks at glid's own 32 x 32 cells, and their kinds."""
    generator = torch.Generator().manual_seed(0)
    kinds = published_masks.glid_kinds(10_000, generator)
    return kinds, published_masks.glid_cells(kinds, 32, 32, generator)


@pytest.mark.parametrize("kind, share", [(0, 0.198), (1, 0.397), (2, 0.405)])
def test_the_shares_of_glids_three_kinds(glid, kind, share):
    assert (glid[0] == kind).float().mean().item() == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("kind, kept, within", [(0, 0.0, 0.0), (1, 0.50, 0.01), (2, 0.56, 0.02)])
def test_how_much_each_kind_keeps(glid, kind, kept, within):
    kinds, holes = glid
    assert 1 - holes[kinds == kind].float().mean().item() == pytest.approx(kept, abs=within)
    assert holes.flatten(1).any(1).all()


def test_a_box_of_glids_takes_at_most_half(glid):
    """Of holes that are one rectangle: uncapped 15 % were larger; some unions of several still are."""
    kinds, holes = glid
    areas = []
    for hole in holes[kinds == published_masks.BOXES][:2000]:
        box = int(hole.any(1).sum() * hole.any(0).sum())
        if int(hole.sum()) == box:
            areas.append(box)
    assert len(areas) > 500 and min(areas) < 16
    assert sum(area > 32 * 32 // 2 for area in areas) < 0.05 * len(areas)


def test_glids_masks_are_whole_cells_on_any_canvas():
    mask = masks.random_masks(200, 64, 40, kinds=["glid"], generator=torch.Generator().manual_seed(1))
    cells = mask[:, ::8, ::8]
    assert torch.equal(mask, cells.repeat_interleave(8, 1).repeat_interleave(8, 2))
    assert mask.flatten(1).any(1).all() and 0.1 < (mask.mean((1, 2)) == 1).float().mean() < 0.35
    assert masks.draw(["glid"], 13, 9).shape == (13, 9)


def test_the_dreambooth_scripts_box():
    """With seed 3 on 64 x 64 its bounding box is (23, 38, 54, 55), ends excluded."""
    at = published_masks.dreambooth_mask(64, 64, random.Random(3)).nonzero()
    assert (*at.amin(0).flip(0).tolist(), *(at.amax(0).flip(0) + 1).tolist()) == (23, 38, 54, 55)


def test_the_dreambooth_scripts_masks_cover_a_fifth():
    rng = random.Random(0)
    shares = [published_masks.dreambooth_mask(256, 256, rng).float().mean().item() for _ in range(4000)]
    assert sum(shares) / 4000 == pytest.approx(0.22, abs=0.01) and min(shares) > 0
    assert sorted(shares)[2000] == pytest.approx(0.16, abs=0.015)
    assert masks.full(1, 8, 8).all()


def test_outpainting_sides_are_bands_of_an_eighth_to_a_half():
    drawn = masks.random_masks(
        400, 64, 64, kinds=["outpaint_sides"], generator=torch.Generator().manual_seed(0)
    ).bool()
    counts = set()
    for mask in drawn:
        rows, columns = ~mask.all(1), ~mask.all(0)  # what is kept is one rectangle
        assert torch.equal(~mask, rows[:, None] & columns[None])
        kept = [axis.nonzero().flatten() for axis in (rows, columns)]
        widths = [w for at in kept for w in (int(at[0]), 63 - int(at[-1])) if w]
        assert widths and all(8 <= w <= 40 for w in widths)
        counts.add(len(widths))
    assert counts == {1, 2, 3, 4}
