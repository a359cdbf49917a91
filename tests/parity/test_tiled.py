"""Painting by windows on diffusers modules: one window is the plain way, several know what came before."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.models import editing, tiled
from comfyui_diptych.models.flux_fill import FluxFill
from comfyui_diptych.models.outpaint import expand, fill
from comfyui_diptych.models.sd_inpaint import SDInpaint

STEPS = editing.Sampling(steps=2, seed=3)


@pytest.fixture(params=["fill", "sd_inpaint"])
def denoiser(request, fill_pipeline, sd_inpaint_pipeline):
    if request.param == "fill":
        return FluxFill.from_pipeline(fill_pipeline)
    return SDInpaint.from_pipeline(sd_inpaint_pipeline)


@pytest.fixture
def canvas(random_image):
    made, mask, _ = expand(random_image(1, 64, 64), right=64)
    return fill(made, mask, "edge"), mask


def plain(denoiser, image, mask):
    function = editing.fill_canvas if isinstance(denoiser, FluxFill) else editing.inpaint_sd
    return function(denoiser, image, mask, "a red circle", sampling=STEPS)


def test_one_window_taken_whole_is_the_plain_way(denoiser, canvas):
    image, mask = canvas
    made = tiled.paint(
        denoiser, image, mask, "a red circle", window=128, known="overwrite", blend=0, sampling=STEPS
    )
    torch.testing.assert_close(made, plain(denoiser, image, mask), rtol=0, atol=1e-5)


def test_the_model_sees_windows_in_which_what_was_painted_is_known(denoiser, canvas, monkeypatch):
    image, mask = canvas
    name = "velocity" if isinstance(denoiser, FluxFill) else "epsilon"
    predict, calls, windows = getattr(denoiser, name), [], []

    def watched(x, time, condition):
        calls.append((tuple(x.shape), condition.features))
        return predict(x, time, condition)

    monkeypatch.setattr(denoiser, name, watched)
    made = tiled.paint(
        denoiser,
        image,
        mask,
        "a red circle",
        window=64,
        sampling=STEPS,
        on_tile=lambda index, count: windows.append((index, count)),
    )
    assert made.shape == image.shape and bool(torch.isfinite(made).all())
    assert windows == [(0, 2), (1, 2)] and {shape[-2:] for shape, _ in calls} == {(8, 8)}
    for call, unknown_columns in ((0, 4), (-1, 4)):  # half of each window is known, the second by painting
        features = calls[call][1]
        if features.ndim == 4:
            share = features[:, 0].mean()
        else:
            share = features[..., -256:].float().mean()
        assert float(share) == unknown_columns / 8


def test_known_latents_are_kept(denoiser, canvas, monkeypatch):
    image, mask = canvas
    kept = []
    monkeypatch.setattr(denoiser, "decode", lambda latents: kept.append(latents) or image)
    tiled.paint(denoiser, image, mask, "a red circle", window=64, sampling=STEPS)
    assert torch.equal(kept[0][..., :8], denoiser.encode(image).float()[..., :8])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"window": 60}, "window is 60 px"),
        ({"window": 512}, "window is 64 cells but the canvas is only 16x8"),
        ({"mask": torch.zeros(1, 64, 128)}, "unknown is empty"),
        ({"image": torch.zeros(2, 64, 128, 3)}, "image has 2 items"),
    ],
)
def test_what_cannot_be_painted_is_one_sentence(denoiser, canvas, change, words):
    given = {"image": canvas[0], "mask": canvas[1], "window": 64} | change
    with pytest.raises(ValueError, match=words):
        tiled.paint(denoiser, prompt="x", sampling=STEPS, **given)


def test_windows_may_have_prompts_of_their_own(denoiser, canvas, monkeypatch):
    image, mask = canvas
    options = {"window": 64, "stride": 32, "sampling": STEPS}
    one = tiled.paint(denoiser, image, mask, "a red circle", **options)
    asked = []

    def prompt(tile):
        asked.append((tile.x, tile.y))
        return "a red circle"

    assert torch.equal(tiled.paint(denoiser, image, mask, prompt, **options), one)
    assert asked == [(4, 0), (8, 0)]
    other = tiled.paint(
        denoiser, image, mask, lambda tile: "blue cat" if tile.x == 8 else "a red circle", **options
    )
    assert not torch.allclose(other[:, :, 96:], one[:, :, 96:], atol=1e-3)
