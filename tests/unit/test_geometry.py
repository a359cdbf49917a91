"""Every fit is a panel FLUX can take, inside its bounds, and undistorted where it says so."""

from __future__ import annotations

import pytest
from comfyui_diptych.models import geometry
from comfyui_diptych.models.geometry import Box
from hypothesis import given, settings
from hypothesis import strategies as st

sides = st.integers(1, 3000)
policies = st.sampled_from(geometry.AUTO_POLICIES)


def contains(outer, box: Box) -> bool:
    return (
        min(box) >= 0
        and box.height > 0
        and box.width > 0
        and box.top + box.height <= outer[0]
        and box.left + box.width <= outer[1]
    )


@settings(max_examples=200, deadline=None)
@given(sides, sides, st.integers(0, 80), policies)
def test_a_fit_stays_inside_and_divides_by_16(height, width, units, policy):
    source = (height, width)
    fit = geometry.fit_width(source, 16 * units, policy) if units else geometry.keep_scale(source, policy)
    assert all(side % 16 == 0 and side >= 16 for side in fit.panel)
    assert contains(source, fit.shown) and contains(fit.panel, fit.filled)
    policy = fit.policy
    if policy != "crop" and (units or min(source) >= 16):
        assert fit.shown == (0, 0, *source)
    if policy == "stretch" or (policy == "crop" and min(source) >= 16):
        assert fit.filled == (0, 0, *fit.panel)


@settings(max_examples=100, deadline=None)
@given(st.integers(16, 3000), st.integers(16, 3000), st.sampled_from(["crop", "pad"]))
def test_keeping_the_size_never_resamples(height, width, policy):
    fit = geometry.keep_scale((height, width), policy)
    assert fit.shown[2:] == fit.filled[2:]


@settings(max_examples=100, deadline=None)
@given(st.integers(64, 3000), st.integers(64, 3000), st.sampled_from(["crop", "pad"]))
def test_crop_and_pad_keep_the_aspect_to_a_pixel(height, width, policy):
    fit = geometry.fit_width((height, width), 512, policy)
    longest = max((2, 3), key=lambda axis: fit.shown[axis])
    scale = fit.filled[longest] / fit.shown[longest]
    for shown, filled in zip(fit.shown[2:], fit.filled[2:], strict=True):
        assert abs(filled - shown * scale) <= max(scale, 1)


@pytest.mark.parametrize("aspect", [(1080, 1920), (1000, 667), (500, 3000), (64, 64), (3000, 500)])
def test_kontext_size_is_the_nearest_of_the_17(aspect):
    height, width = geometry.kontext_size(aspect)
    wanted = aspect[1] / aspect[0]
    assert (width, height) in geometry.KONTEXT_SIZES and len(geometry.KONTEXT_SIZES) == 17
    assert abs(width / height - wanted) == min(abs(w / h - wanted) for w, h in geometry.KONTEXT_SIZES)


def test_area_size_is_about_the_asked_area():
    height, width = geometry.area_size((1080, 1920), 0.5)
    assert height % 16 == width % 16 == 0
    assert height * width == pytest.approx(0.5 * 2**20, rel=0.03)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: geometry.fit_width((64, 64), 500, "stretch"), "500"),
        (lambda: geometry.fit_width((64, 64), -16, "stretch"), "-16"),
        (lambda: geometry.place((64, 64), (32, 32), "squash"), "squash"),
        (lambda: geometry.area_size((64, 64), 0), "megapixels is 0"),
        (lambda: geometry.area_size((64, 64), float("nan")), "megapixels is nan"),
    ],
)
def test_a_wrong_size_is_one_clear_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@settings(max_examples=200, deadline=None)
@given(sides, sides)
def test_auto_bends_no_aspect_by_more_than_5_percent(height, width):
    source = (height, width)
    fit = geometry.place(source, geometry.kontext_size(source), "auto")
    assert fit.policy in geometry.POLICIES
    rounding = max(1 / min(fit.shown[2:]), 1 / min(fit.filled[2:]))  # to whole pixels
    assert geometry.distortion(fit.shown[2:], fit.filled[2:]) <= 1.05 + 2 * rounding
    if fit.policy == "crop":  # never more than a tenth
        assert fit.shown.height * fit.shown.width >= 0.9 * height * width - max(source)


@pytest.mark.parametrize(
    "size, policy",
    [((1024, 1024), "stretch"), ((1080, 1920), "stretch"), ((926, 1000), "crop"), ((300, 1200), "pad")],
)
def test_auto_takes_the_least_that_will_do(size, policy):
    panel = geometry.kontext_size(size)
    assert geometry.resolve("auto", size, panel) == policy
    assert geometry.resolve("auto", size, panel, masked=True) == ("pad" if policy == "crop" else policy)
    for named in geometry.POLICIES:
        assert geometry.resolve(named, size, panel) == named


def test_within_the_trained_aspects_auto_never_pads():
    for width in range(430, 2334):
        assert geometry.resolve("auto", (1000, width), geometry.kontext_size((1000, width))) != "pad"


@pytest.mark.parametrize("size", [(4096, 1), (1, 10**7), (10**5, 10**5)])
def test_a_panel_beyond_the_limit_is_refused_by_its_number(size):
    fit = geometry.fit_width(size, 512, "stretch") if size[0] == 4096 else geometry.keep_scale(size, "pad")
    with pytest.raises(ValueError, match="at most 33 megapixels") as error:
        geometry.check_panel(size, fit)
    assert f"{size[1]}x{size[0]} image" in str(error.value)
