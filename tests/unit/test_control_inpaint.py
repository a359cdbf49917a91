"""The ControlNet's hint, its cells, and the composite that leaves everything else as it was."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.models import control_inpaint


def scene(batch: int = 1, height: int = 64, width: int = 96):
    image = torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(batch, height, width)
    mask[:, 20:41, 30:55] = 1
    return image, mask


def test_the_hint_is_the_image_and_exactly_minus_one_under_the_mask():
    image, mask = scene()
    seen = control_inpaint.hint(image, mask)
    assert torch.equal(seen[mask == 0], image[mask == 0])
    assert seen.min() == -1 and bool((seen[mask == 1] == -1).all())


@pytest.mark.parametrize("offset", range(8))
def test_cells_are_repainted_within_a_pixel_of_the_mask(offset):
    mask = (torch.arange(64) >= 24 + offset).float().expand(1, 64, 64)
    row = control_inpaint.cells(mask)[0, 0, 3].tolist()
    assert row == [0, 0, float(offset == 0), 1, 1, 1, 1, 1]


def test_the_composite_is_the_image_beyond_its_reach():
    image, mask = scene()
    result = 1 - image
    finished = control_inpaint.composite(result, image, mask)
    around = torch.nn.functional.max_pool2d(mask[:, None], 13, stride=1, padding=6)[:, 0]
    assert control_inpaint.REACH == 6
    assert torch.equal(finished[around == 0], image[around == 0])
    assert not torch.equal(finished[around == 1], image[around == 1])
    inside = -torch.nn.functional.max_pool2d(-mask[:, None], 7, stride=1, padding=3)[:, 0]
    torch.testing.assert_close(finished[inside == 1], result[inside == 1])
    weight = control_inpaint.composite_mask(mask)
    assert weight[0, 30, 26] == pytest.approx(3 / 7) and weight.max() == 1  # grown 3, half of 7 more


def test_a_mask_over_everything_composites_everything():
    weight = control_inpaint.composite_mask(torch.ones(1, 16, 16))
    torch.testing.assert_close(weight, torch.ones_like(weight))


def test_odd_sizes_batches_and_a_fill():
    image, mask = scene(1, 61, 93)
    made = control_inpaint.prepared(image, mask.expand(2, -1, -1), prefill="mean")
    assert made.image.shape == made.filled.shape == (2, 64, 96, 3)  # to the nearest multiple of 8
    assert torch.equal(made.filled[made.mask == 0], made.image[made.mask == 0])
    assert not torch.equal(made.filled, made.image)
    with pytest.raises(ValueError, match="mask is empty"):
        control_inpaint.prepared(image, mask * 0)
