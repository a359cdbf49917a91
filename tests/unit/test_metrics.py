"""PSNR and SSIM against their definitions written out with scipy; preservation against a hand count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfyui_diptych.training.rewards import metrics
from hypothesis import given, settings
from hypothesis import strategies as st


def image_and_noisy(seed, n=2, height=19, width=26):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(n, height, width, 3, generator=generator)
    return a, (a + 0.2 * torch.randn(a.shape, generator=generator)).clamp(0, 1)


def ssim_by_definition(x, y):
    """Wang et al. 2004 on one channel in float64, with scipy's filter (mirrored borders, radius 5)."""
    ndimage = pytest.importorskip("scipy.ndimage")

    def mean(p):
        return ndimage.gaussian_filter(p, 1.5, truncate=3.5, mode="mirror")

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    return ((2 * mx * my + 1e-4) * (2 * cov + 9e-4)) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999))
def test_ssim_equals_its_definition(seed):
    a, b = image_and_noisy(seed)
    got = metrics.ssim_map(a, b)
    for n in range(2):
        channels = [ssim_by_definition(*(p[n, ..., c].double().numpy() for p in (a, b))) for c in range(3)]
        assert np.abs(got[n].numpy() - np.mean(channels, 0)).max() < 1e-4
        inside = np.mean(channels, 0)[5:-5, 5:-5].mean()
        assert metrics.ssim(a, b)[n].item() == pytest.approx(inside, abs=1e-4)


def test_equal_images_score_best_and_inverted_ones_badly():
    a, _ = image_and_noisy(0)
    assert metrics.ssim(a, a).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert metrics.psnr(a, a).tolist() == [metrics.PSNR_CAP] * 2
    assert metrics.ssim(a, 1 - a).max() < 0


def test_psnr_of_a_known_error():
    a = torch.full((1, 4, 4, 3), 0.5)
    assert metrics.psnr(a, a + 0.1).item() == pytest.approx(20, abs=1e-4)


def test_preservation_counts_only_what_lies_outside_the_mask():
    source = torch.zeros(2, 4, 4, 3)
    edited, mask = source.clone(), torch.zeros(2, 4, 4)
    edited[:, :2], mask[:, :2] = 1.0, 1.0
    edited[:, 3, 0] = 0.8
    mask[1] = 1.0
    kept = metrics.kept_l1(edited, source, mask)
    assert kept[0].item() == pytest.approx(0.1) and kept[1].isnan()


def test_images_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="one size"):
        metrics.psnr(torch.zeros(1, 4, 4, 3), torch.zeros(1, 4, 5, 3))
    with pytest.raises(ValueError, match="10x12.*at least 11x11"):
        metrics.ssim(torch.zeros(1, 12, 10, 3), torch.zeros(1, 12, 10, 3))
