"""How an inpainting model is told of a hole: the table of the down-samplings, thresholds, gray and soft."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.models.inpaint_masks import MASK_RESIZE, MaskRule, latent_mask, tell

# A hole from column 24 + o on: for which o (0 to 7) the cell of columns 24 to 31 counts as unknown.
UNKNOWN = {"nearest": [0], "bilinear": range(4), "area": range(5), "max": range(8)}


@pytest.mark.parametrize("how", MASK_RESIZE)
def test_which_half_covered_cells_are_repainted(how):
    for offset in range(8):
        mask = (torch.arange(64) >= 24 + offset).float().expand(1, 1, 64, 64)
        cells = latent_mask(mask, how)
        assert cells.shape == (1, 1, 8, 8)
        assert cells[0, 0, 5].tolist() == [0, 0, 0, float(offset in UNKNOWN[how]), 1, 1, 1, 1], offset


@pytest.mark.parametrize("how", MASK_RESIZE)
def test_a_mask_on_the_grid_is_the_same_by_every_rule(how):
    cells = (torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    mask = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(latent_mask(mask, how), cells) and torch.equal(
        latent_mask(mask, how, soft=True), cells
    )


@pytest.mark.parametrize(
    ("value", "repainted"), [(0.49, 0), (127 / 255, 0), (0.5, 1), (128 / 255, 1), (0.51, 1)]
)
def test_the_usual_threshold_is_that_of_diffusers(value, repainted):
    told = tell(torch.rand(1, 16, 16, 3), torch.full((1, 16, 16), value))
    assert told.mask.unique().tolist() == told.cells.unique().tolist() == [repainted]


def test_another_threshold_and_soft_masks():
    image, mask = torch.rand(1, 16, 16, 3), torch.full((1, 16, 16), 0.3)
    assert tell(image, mask, MaskRule(threshold=0.3)).cells.tolist() == [[[[1, 1], [1, 1]]]]
    told = tell(image, mask, MaskRule(soft=True))
    torch.testing.assert_close(told.cells, torch.full((1, 1, 2, 2), 0.3))
    torch.testing.assert_close(told.masked, 0.7 * image + 0.3 * 0.5)


def test_soft_cells_are_the_maximum_the_first_the_middle_and_the_mean():
    mask = torch.arange(8.0).div(10).expand(1, 1, 8, 8)
    found = [latent_mask(mask, how, soft=True).item() for how in ("max", "nearest", "bilinear", "area")]
    assert found == pytest.approx([0.7, 0.0, 0.35, 0.35])


def test_what_is_repainted_is_gray_or_shown():
    image, mask = torch.rand(1, 16, 16, 3), torch.zeros(2, 16, 16)
    mask[0, :8] = mask[1, :, 4:] = 1
    hidden, shown = tell(image, mask), tell(image, mask, MaskRule(masked="original"))
    assert torch.equal(hidden.masked, torch.where(mask[..., None] > 0, 0.5, image))
    assert torch.equal(shown.masked, image) and torch.equal(shown.cells, hidden.cells)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (MaskRule(resize="mean"), "mask_resize is 'mean': choose one of max, nearest, bilinear, area"),
        (MaskRule(masked="black"), "masked is 'black': choose one of gray, original"),
        (MaskRule(threshold=0.0), "threshold is 0.0: give a number above 0, up to 1"),
    ],
)
def test_an_unknown_rule_is_one_sentence(rule, message):
    with pytest.raises(ValueError, match=message):
        tell(torch.rand(1, 16, 16, 3), torch.ones(1, 16, 16), rule)
