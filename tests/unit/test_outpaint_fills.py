"""Every fill keeps known pixels bit for bit; each does what its name says in the field."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfyui_diptych import missing
from comfyui_diptych.models.outpaint import FILLS, LATENT_FILLS, expand, fill
from comfyui_diptych.models.outpaint.extend import nearest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

OWN = [how for how in FILLS if how not in ("telea", "ns", "lama")]
INSTALLED = [*OWN, *(("telea", "ns") if find_spec("cv2") else ())]
CONTINUING = [how for how in INSTALLED if how not in ("neutral", "colour")]


def photo(height=40, width=56, batch=1, seed=0, dtype=torch.float32):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hole(height=40, width=56, batch=1):
    mask = torch.zeros(batch, height, width)
    mask[:, :, 40:] = 1
    mask[:, 10:20, 5:15] = 1
    return mask


@pytest.mark.parametrize("how", INSTALLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_pixels_stay_and_soft_masks_mix(how, dtype):
    image, mask = photo(batch=2, dtype=dtype), hole(batch=2)
    filled = fill(image, mask, how)
    assert filled.dtype == dtype and filled.shape == image.shape
    assert torch.equal(filled[mask == 0], image[mask == 0])
    assert bool((filled[mask == 1] != image[mask == 1]).any())
    assert bool(torch.isfinite(filled).all()) and 0 <= float(filled.min()) <= float(filled.max()) <= 1
    assert torch.equal(filled, fill(image, mask, how))
    soft = torch.where(mask == 1, 0.75, mask)
    assert torch.allclose(
        fill(image, soft, "neutral"), torch.lerp(image, 0.5 + 0 * image, soft[..., None].to(dtype))
    )


@pytest.mark.parametrize("how", CONTINUING)
def test_a_constant_image_stays_constant(how):
    image = torch.tensor([0.2, 0.6, 0.9]).expand(1, 40, 56, 3)
    tolerance = 5 if how in ("telea", "ns") else 1  # OpenCV drifts by 8-bit rounding
    assert float((fill(image, hole(), how) - image).abs().max()) <= tolerance / 255


@pytest.mark.parametrize("how", CONTINUING)
def test_an_item_in_which_nothing_is_known_is_gray_and_the_others_are_filled(how):
    image, mask = photo(batch=2), hole(batch=2)
    mask[1] = 1
    filled = fill(image, mask, how)
    assert bool((filled[1] == 0.5).all())
    assert torch.equal(filled[0], fill(image, mask[:1], how)[0])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CONTINUING), st.integers(0, 10**6))
def test_any_hole_is_filled(how, seed):
    generator = torch.Generator().manual_seed(seed)
    height, width = torch.randint(1, 30, (2,), generator=generator).tolist()
    image = torch.rand(1, height, width + 1, 3, generator=generator)
    mask = (torch.rand(1, height, width + 1, generator=generator) < 0.5).float()
    mask[0, 0, 0] = 1
    filled = fill(image, mask, how)
    assert torch.equal(filled[mask == 0], image[mask == 0]) and bool(torch.isfinite(filled).all())


def test_neutral_and_colour():
    image, mask = photo(), hole()
    assert bool((fill(image, mask, "neutral")[mask == 1] == 0.5).all())
    assert torch.equal(fill(image, mask, "colour")[0, 0, 50], torch.tensor([0.0, 1.0, 0.0]))
    assert torch.allclose(
        fill(image, mask, "colour", colour="#336699")[0, 0, 50], torch.tensor([0.2, 0.4, 0.6])
    )
    assert torch.equal(
        fill(image, mask, "colour", colour=(0.25, 0.5, 1))[0, 0, 50], torch.tensor([0.25, 0.5, 1])
    )


@pytest.mark.parametrize("how, mode", [("edge", "edge"), ("mirror", "symmetric")])
def test_around_a_rectangle_edge_and_mirror_are_numpy_pad(how, mode):
    image = photo(20, 30)
    canvas, mask, _ = expand(image, left=7, top=3, right=75, bottom=50, multiple=1)
    expected = np.pad(image[0].numpy(), ((3, 50), (7, 75), (0, 0)), mode=mode)
    assert np.array_equal(fill(canvas, mask, how)[0].numpy(), expected)


def test_mirror_reflects_into_a_hole():
    image, mask = photo(20, 40), torch.zeros(1, 20, 40)
    mask[:, :, 20:26] = 1
    filled = fill(image, mask, "mirror")[0]
    assert torch.equal(filled[:, 20:23], image[0, :, 17:20].flip(1))
    assert torch.equal(filled[:, 23:26], image[0, :, 26:29].flip(1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10**6), st.sampled_from([0.03, 0.3, 0.8]))
def test_nearest_finds_the_nearest_known_pixel(height, width, seed, density):
    known = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < density
    known[height // 2, width // 3] = True
    rows, columns = nearest(known)
    assert bool(known[rows, columns].all())
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    best = (grid[:, None] - known.nonzero()).square().sum(2).amin(1)
    found = (grid - torch.stack((rows.flatten(), columns.flatten()), dim=1)).square().sum(1)
    assert torch.equal(found, best)


def test_blur_is_smooth_and_between_its_neighbours():
    image = torch.zeros(1, 64, 64, 3)
    image[:, :, 40:] = 1
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 16:40] = 1
    row = fill(image, mask, "blur")[0, 30, :, 0]
    assert float(row.diff().abs().max()) < 0.15 and float(row.diff().min()) > -1e-3
    assert 0.3 < float(row[28]) < 0.7


def test_mean_and_gaussian_have_the_known_pixels_statistics():
    image, mask = photo(200, 200) * 0.4 + 0.3, torch.zeros(1, 200, 200)
    mask[:, 50:] = 1
    image[:, 50:] = 0
    known = image[:, :50].reshape(-1, 3)
    assert torch.allclose(fill(image, mask, "mean")[0, 100, 100], known.mean(0), atol=1e-6)
    for how in ("gaussian", "perlin"):
        filled = fill(image, mask, how)[:, 50:].reshape(-1, 3)
        assert torch.allclose(filled.mean(0), known.mean(0), atol=0.06)
        assert torch.allclose(filled.std(0), known.std(0), rtol=0.35)
    assert not torch.equal(fill(image, mask, "gaussian"), fill(image, mask, "gaussian", seed=1))


def test_perlin_is_smooth_at_its_scale():
    image, mask = photo(128, 128), torch.zeros(1, 128, 128)
    mask[:, 8:] = 1
    steps = [
        float(fill(image, mask, "perlin", cell=cell, octaves=1)[:, 8:].diff(dim=2).abs().mean())
        for cell in (8, 64)
    ]
    assert steps[1] < steps[0] / 4


# mk2's matched noise. The golden values were computed with stable-diffusion-webui-forge's get_matched_noise
# and scikit-image on this scene; the whole arrays agreed exactly.


def scene(height=48, width=40, left=12, blur=3):
    y, x = np.mgrid[:height, :width]
    image = np.stack(
        (
            0.5 + 0.4 * np.sin(x / 17 + y / 31),
            0.5 + 0.4 * np.cos(x / 23 - y / 11),
            0.5 + 0.3 * np.sin(x * y / 900),
        ),
        axis=-1,
    )
    image[:, :left] = 0
    mask = np.zeros((height, width))
    mask[:, : left + blur] = 1
    return torch.from_numpy(image)[None], torch.from_numpy(mask)[None]


@pytest.mark.parametrize(
    "options, golden",
    [
        (
            {},
            {
                (0, 0): (0.84140302, 0.61242203, 0.67674343),
                (20, 10): (0.88166272, 0.87128633, 0.61641585),
                (47, 14): (0.82334666, 0.26196612, 0.73984174),
            },
        ),
        (
            {"noise_q": 0.5, "color_variation": 0.4},
            {
                (0, 0): (0.73480418, 0.24374081, 0.74677261),
                (20, 10): (0.89826772, 0.8394719, 0.55009749),
                (47, 14): (0.78277885, 0.69257154, 0.66755311),
            },
        ),
    ],
)
def test_noise_is_mk2s(options, golden):
    image, mask = scene()
    filled = fill(image, mask, "noise", **options)[0]
    for (y, x), colour in golden.items():
        assert torch.allclose(filled[y, x], torch.tensor(colour, dtype=torch.float64), atol=1e-8)
    hole = filled[:, :15]
    assert abs(float(hole.mean()) - 0.6631092098949666) < 1e-9
    assert abs(float(hole.std(correction=0)) - 0.2031579789184802) < 1e-9


def mk2_formula(image, mask, q=1.0, variation=0.05, seed=0):
    """The eight steps one channel at a time, no guards; the histogram by sorting."""
    height, width = mask.shape

    def forward(plane):
        return np.fft.ifftshift(np.fft.fft2(np.fft.fftshift(plane), norm="ortho"))

    def back(plane):
        return np.fft.ifftshift(np.fft.ifft2(np.fft.fftshift(plane), norm="ortho")).real

    window = np.empty((height, width))
    for i in range(height):
        for j in range(width):
            y = (i / height * 2 - 1) * height / min(height, width)
            x = (j / width * 2 - 1) * width / min(height, width)
            window[i, j] = 1 / ((y * y + 1) * (x * x + 1))
    noise = np.random.default_rng(seed).random((height, width, 3))
    gray = noise.mean(axis=2)
    seen = [image[..., c] * (1 - mask) for c in range(3)]
    brightest = np.max(seen)
    shaped = np.empty_like(image)
    for c in range(3):
        spectrum = forward(seen[c] / brightest + image.mean() * mask)
        start = back(forward(noise[..., c] * variation + (1 - variation) * gray) * window)
        power = np.abs(forward(start)) ** 2
        shaped[..., c] = back(power * np.abs(spectrum) ** q * np.exp(1j * np.angle(spectrum)))
    shaped = (shaped - shaped.min()) / (shaped.max() - shaped.min())
    result = image.copy()
    for c in range(3):
        values, reference = shaped[..., c][mask > 0], np.sort(image[..., c][mask == 0])
        ranks = np.searchsorted(np.sort(values), values, side="right") / values.size
        levels = np.unique(reference)
        shares = np.searchsorted(reference, levels, side="right") / reference.size
        result[..., c][mask > 0] = np.interp(ranks, shares, levels)
    return result


@pytest.mark.parametrize("options", [{}, {"q": 0.5, "variation": 0.6}, {"q": 2.0, "seed": 7}])
def test_noise_is_the_formula(options):
    image = photo(44, 36, seed=3, dtype=torch.float64)
    mask = torch.zeros(1, 44, 36, dtype=torch.float64)
    mask[:, :15] = 1
    image[:, :13] = 0
    names = {"q": "noise_q", "variation": "color_variation", "seed": "seed"}
    filled = fill(image, mask, "noise", **{names[name]: value for name, value in options.items()})
    expected = mk2_formula(image[0].numpy(), mask[0].numpy(), **options)
    assert np.abs(filled[0].numpy() - expected).max() <= 1e-9


@pytest.mark.parametrize("kind", ["black", "constant", "separable", "all hole", "almost all hole"])
@pytest.mark.parametrize("noise_q", [0.0, 1.0])
def test_noise_is_finite_where_mk2_is_not(kind, noise_q):
    image, mask = scene()
    if kind == "black":
        image = image * 0
    elif kind == "constant":
        image = image * 0 + 0.3
    elif kind == "separable":
        image = torch.outer(torch.linspace(0, 1, 48), torch.linspace(0, 1, 40))[None, ..., None].expand(
            1, -1, -1, 3
        )
    elif kind == "all hole":
        mask = mask * 0 + 1
    else:
        mask = mask * 0 + 0.01
    assert bool(torch.isfinite(fill(image, mask, "noise", noise_q=noise_q)).all())


def test_noise_gets_smoother_with_q_and_has_the_images_colours():
    image, mask = scene(120, 128, 40, 0)
    texture = gaussian_filter(np.random.default_rng(1).normal(size=(120, 128, 1)), (2, 2, 0))
    image = torch.where(mask[..., None] > 0, image, (image + torch.from_numpy(texture)).clamp(0, 1))
    shares = []
    for q in (0.0, 0.5, 1.0, 2.0):
        filled = fill(image, mask, "noise", noise_q=q)[0, :, :40].numpy()
        power = np.abs(np.fft.fft2(filled - filled.mean((0, 1)), axes=(0, 1))) ** 2
        y, x = np.fft.fftfreq(120)[:, None, None], np.fft.fftfreq(40)[None, :, None]
        shares.append(float((power * (np.hypot(y, x) > 0.15)).sum() / power.sum()))
        for quantile in (0.05, 0.5, 0.95):
            known = np.quantile(image[0, :, 40:].numpy(), quantile, axis=(0, 1))
            assert np.abs(np.quantile(filled, quantile, axis=(0, 1)) - known).max() < 0.02
    assert shares == sorted(shares, reverse=True)


def test_mosaic_has_three_times_twenty_four_tiles():
    image = photo(80, 100)
    canvas, mask, _ = expand(image, right=0.5, unit="fraction", multiple=1)
    filled = fill(canvas, mask, "mosaic")
    assert torch.equal(filled[:, :, :100], image)
    assert len(filled[0, :, 100:].reshape(-1, 3).unique(dim=0)) == 72
    canvas, mask, _ = expand(image, **dict.fromkeys(("left", "top", "right", "bottom"), 40), multiple=1)
    filled = fill(canvas, mask, "mosaic")
    assert torch.equal(filled[:, 40:120, 40:140], image)
    assert len(filled[0, 40:120, :40].reshape(-1, 3).unique(dim=0)) == 72
    assert len(filled[0, :40, 40:140].reshape(-1, 3).unique(dim=0)) == 72
    assert len(filled[0, :40, :40].reshape(-1, 3).unique(dim=0)) == 13**2


def test_mosaic_shows_what_is_next_to_the_edge():
    image = torch.linspace(0, 1, 100)[None, None, :, None].expand(1, 80, 100, 3).clone()
    canvas, mask, _ = expand(image, right=48, multiple=1)
    tiles = fill(canvas, mask, "mosaic")[0, 0, 100:, 0].unique()
    # three tiles of the mirror image, stretched fourfold: 4 px of the image each
    assert torch.allclose(tiles.flip(0), torch.tensor([97.5, 93.5, 89.5]) / 99, atol=0.008)


def test_latent_fills():
    latent = torch.randn(2, 16, 32, 32)
    mask = torch.zeros(1, 32, 32)
    mask[:, 16:] = 1
    noise, nothing = (fill(latent, mask, how) for how in LATENT_FILLS)
    assert torch.equal(nothing[:, :, :16], latent[:, :, :16]) and bool((nothing[:, :, 16:] == 0).all())
    assert torch.equal(noise[:, :, :16], latent[:, :, :16]) and abs(float(noise[:, :, 16:].std()) - 1) < 0.05


class FakeLama:
    """Returns the image with its hole made 0.25, in the size it was given."""

    architecture = SimpleNamespace(name="LaMa")

    def __init__(self):
        self.calls = []

    def to(self, device):
        return self

    eval = lambda self: self  # noqa: E731

    def __call__(self, image, mask):
        self.calls.append((tuple(image.shape), tuple(mask.shape), mask.unique().tolist()))
        return torch.where(mask > 0, 0.25, image)


def test_lama_runs_at_its_size_through_spandrel(monkeypatch, tmp_path):
    network = FakeLama()
    loader = SimpleNamespace(load_from_file=lambda path: network)
    spandrel = SimpleNamespace(ModelLoader=lambda device: loader, MaskedImageModelDescriptor=FakeLama)
    monkeypatch.setitem(sys.modules, "spandrel", spandrel)
    file = tmp_path / "big-lama.pt"
    file.write_bytes(b"weights")
    image, mask = photo(96, 128, 2), torch.zeros(1, 96, 128)
    mask[:, 20:60, 30:80] = 1
    filled = fill(image, mask, "lama", model=file, size=48)
    assert network.calls == [((1, 3, 48, 64), (1, 1, 48, 64), [0.0, 1.0])] * 2
    assert torch.equal(filled[:, mask[0] == 0], image[:, mask[0] == 0])
    assert torch.allclose(filled[:, 30:50, 40:70], torch.tensor(0.25), atol=1e-4)
    spandrel.MaskedImageModelDescriptor = int
    with pytest.raises(ValueError, match="a LaMa model, which fills no holes"):
        fill(image, mask, "lama", model=file)


@pytest.mark.parametrize(
    "how, module, words",
    [("telea", "cv2", "OpenCV is not installed"), ("lama", "spandrel", "spandrel is not installed")],
)
def test_a_missing_library_is_one_sentence_with_the_remedy(monkeypatch, tmp_path, how, module, words):
    monkeypatch.setitem(sys.modules, module, None)
    file = tmp_path / "lama.safetensors"
    file.write_bytes(b"")
    options = {"model": file} if how == "lama" else {}
    with pytest.raises(ValueError) as error:
        fill(photo(), hole(), how, **options)
    assert words in str(error.value) and missing.install(module) in str(error.value)


@pytest.mark.parametrize(
    "canvas, mask, how, options, words",
    [
        (photo(), hole() * 0, "edge", {}, "mask is empty"),
        (photo(), hole(56, 40), "edge", {}, "mask is 40x56 but the canvas is 56x40"),
        (photo(), hole() * float("nan"), "edge", {}, "mask holds"),
        (photo() * float("inf"), hole(), "edge", {}, "canvas holds"),
        (photo(1, 1), torch.ones(1, 1, 1), "edge", {}, "canvas is 1x1"),
        (photo(), hole(), "magic", {}, "how is 'magic'"),
        (photo(), hole(), "edge", {"radius": 3}, "fill 'edge' has no option 'radius'"),
        (photo(), hole(), "noise", {"q": 3}, "it has noise_q, color_variation, seed"),
        (photo(), hole(), "noise", {"noise_q": -1}, "noise_q is -1"),
        (photo(), hole(), "colour", {"colour": "green"}, "colour is 'green'"),
        (photo(), hole(), "perlin", {"cell": 0}, "cell is 0"),
        (photo(), hole(), "lama", {}, "model is missing"),
        (photo(), hole(), "lama", {"model": "/no/such.pt"}, "model is /no/such.pt"),
        (photo(), hole()[0], "latent_noise", {}, "but the latent is 3x56"),
        (photo()[0], hole(), "latent_noise", {}, "is for latents"),
    ],
)
def test_bad_input_is_one_sentence(canvas, mask, how, options, words):
    with pytest.raises(ValueError) as error:
        fill(canvas, mask, how, **options)
    assert words in str(error.value) and "\n" not in str(error.value)
