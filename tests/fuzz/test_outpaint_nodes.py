"""Outpainting methods and the canvas store on whatever a graph can hand them: a result or one sentence."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
from comfyui_diptych.models import glid, outpaint
from comfyui_diptych.models.outpaint.store import OVER, CanvasStore, Region
from hypothesis import given
from hypothesis import strategies as st
from strategies import images, masks, tried

amounts = st.integers(-40, 90)


def paint(piece: outpaint.Piece) -> torch.Tensor:
    """A model that paints black; what it is given must be what one takes."""
    batch, height, width, channels = piece.image.shape
    assert channels == 3 and bool(piece.image.isfinite().all())
    assert tuple(piece.mask.shape[1:]) == (height, width)
    assert not height % 8 and not width % 8
    if piece.cells is not None:
        assert tuple(piece.cells.shape[1:]) == (height // 8, width // 8) and piece.cells.dtype == torch.bool
    return torch.zeros_like(piece.image)


@given(st.data())
def test_every_method(data):
    draw = data.draw
    image = draw(images())
    sides = {side: draw(amounts) for side in ("left", "right", "top", "bottom")}
    usual = dict(
        window=st.sampled_from([16, 48, 64, 512]),
        fill=st.sampled_from([outpaint.AUTO, "edge", "blur", "perlin", "neutral"]),
        mask_blur=st.one_of(st.none(), st.integers(0, 64)),
        overlap=st.integers(0, 40),
        feather=st.integers(0, 40),
        match_colour=st.booleans(),
        noise_q=st.floats(0, 4),
        color_variation=st.floats(0, 1),
        seed=st.integers(0, 2**64 - 1),
    )
    options = outpaint.Options(**{name: draw(kind) for name, kind in usual.items()})
    method = draw(st.sampled_from(outpaint.METHODS))
    made = tried(outpaint.outpaint, paint=paint, image=image, sides=sides, method=method, options=options)
    if made is None:
        return
    assert bool(made.isfinite().all()) and float(made.min()) >= 0 and float(made.max()) <= 1
    height, width = image.shape[-3:-1] if image.ndim > 2 else image.shape
    grown = (height + sides["top"] + sides["bottom"], width + sides["left"] + sides["right"])
    if method in ("mk2", "poor man"):
        assert made.shape[1] >= grown[0] and made.shape[2] >= grown[1]
    else:
        assert tuple(made.shape[1:3]) == grown


@given(st.data())
def test_the_canvas_store(data):
    with TemporaryDirectory() as folder:
        written_and_read(data.draw, CanvasStore(folder))


def written_and_read(draw, store):
    place = st.one_of(st.integers(-3000, 3000), st.integers(-(2**25), 2**25))
    for _ in range(draw(st.integers(1, 3))):
        image, mask = draw(images()), draw(st.one_of(st.none(), masks()))
        x, y, over = draw(place), draw(place), draw(st.sampled_from(OVER))
        region = tried(store.write, image=image, x=x, y=y, mask=mask, over=over)
        if region is None:
            continue
        again, unknown = store.read(region)
        assert bool(again.isfinite().all()) and set(unknown.unique().tolist()) <= {0.0, 1.0}
        if mask is None and over != "unknown" and image.shape[-1] == 3:
            assert not unknown.any()
            assert float((again - image.reshape(again.shape).clamp(0, 1)).abs().max()) <= 0.5 / 255 + 1e-6
    sides = st.integers(-5, 300)
    tried(store.read, region=Region(draw(place), draw(place), draw(sides), draw(sides)))
    if store.bounds is not None and store.bounds.width * store.bounds.height < 10**7:
        _, unknown, region = store.export()
        for side in (unknown[:, 0], unknown[:, -1], unknown[:, :, 0], unknown[:, :, -1]):
            assert not side.all()


@given(st.data())
def test_glids_known_latents(data):
    draw = data.draw
    batch, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    image = torch.rand(batch, 8 * rows, 8 * columns, 3, generator=generator)
    coarse = torch.rand(batch, 1, rows, columns, generator=generator) > draw(st.floats(0, 1))
    mask = torch.nn.functional.interpolate(coarse.float(), scale_factor=8)[:, 0]
    white = draw(st.sampled_from(glid.WHITE))

    def encode(part):
        return torch.nn.functional.avg_pool2d(part.movedim(-1, 1), 8)[:, [0, 1, 2, 0]] + 1

    made = tried(glid.known_latents, encode=encode, image=image, mask=mask, white_means=white)
    unknown = coarse if white == "repaint" else ~coarse
    if made is None:
        assert not unknown.any()
        return
    latents, known = made
    assert torch.equal(known, ~unknown)
    assert torch.equal(latents, torch.where(known, encode(image), torch.zeros(())))
