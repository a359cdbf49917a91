"""Core nodes on whatever a graph can hand them: a result or one sentence, and inputs are never written to."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from comfyui_diptych.models import diptych as dp
from comfyui_diptych.models import pixels
from comfyui_diptych.nodes import NODE_CLASS_MAPPINGS as NODES
from hypothesis import given
from hypothesis import strategies as st
from strategies import filled, images, masks, policies, tried, widgets


class Vae:
    """8x average pooling to some channels; what it is given must be what a VAE takes."""

    def __init__(self, channels=16):
        self.channels = channels

    def encode(self, image):
        assert image.ndim == 4 and image.shape[3] == 3 and not (image.shape[1] % 16 or image.shape[2] % 16)
        assert bool(image.isfinite().all())
        pooled = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 8)
        return pooled[:, torch.arange(self.channels) % 3].contiguous()


def hard(mask, height, width):
    """Which pixels a mask repaints, as the rule is written down in docs/architecture.md."""
    painted = pixels.painted(mask)
    if painted is None:
        return torch.ones(1, height, width)
    return pixels.resize_mask((painted >= 0.5).float(), height, width)


@given(st.data())
def test_build_and_split(data):
    draw = data.draw
    image = draw(images())
    given_mask = draw(st.none() | masks())
    options = widgets(
        draw,
        panel_width=st.integers(0, 6).map(lambda units: 16 * units),
        policy=policies,
        side=st.sampled_from(dp.SIDES),
        second_panel=st.sampled_from(dp.SECOND),
        second_seed=st.integers(0, 2**64 - 1),
        template=st.sampled_from([dp.ICEDIT_TEMPLATE, "{instruction}", "", "x" * 5000]),
        keep_rest=st.booleans(),
    )
    options.setdefault("panel_width", 32)
    builder, splitter = NODES["DiptychBuilder"](), NODES["DiptychSplit"]()
    built = tried(
        builder.build, image=image, instruction=draw(st.text(max_size=20)), edit_mask=given_mask, **options
    )
    if built is None:
        return
    canvas, mask, text, layout = built
    assert canvas.shape[1] % 16 == canvas.shape[2] % 16 == 0 and canvas.shape[:3] == mask.shape
    assert set(mask.unique().tolist()) <= {0.0, 1.0} and isinstance(text, str)
    assert bool(mask.flatten(1).any(dim=1).all())  # something is repainted in each

    result = filled(canvas.shape, "uniform", torch.float32, 1)
    split_mask = draw(st.none() | masks(odd=False))
    options = widgets(
        draw,
        paste=st.sampled_from(dp.PASTE),
        feather=st.integers(0, 40),
        threshold=st.floats(0.005, 1),
    )
    parts = tried(splitter.split, image=result, layout=layout, mask=split_mask, **options)
    if parts is None:
        return
    source = pixels.as_image(image)
    edited, beside = parts
    assert edited.shape[1:] == beside.shape[1:] == (*source.shape[1:3], 4 if source.shape[3] == 4 else 3)
    assert bool(edited.isfinite().all())
    if options.get("paste") == "panel":
        return
    own = split_mask if pixels.painted(split_mask) is not None else given_mask
    if (
        own is not None
        and pixels.painted(own) is not None
        and not (own is split_mask and own.ndim == 3 and bool((own.amax((1, 2)) == 0).any()))
    ):
        outside = hard(own, *source.shape[1:3]) == 0
        count = len(edited)
        outside, whole = pixels.repeat_batch(outside, count), pixels.repeat_batch(source, count)
        if whole.shape[3] == 1:
            whole = whole.expand(-1, -1, -1, 3)
        assert torch.equal(edited[outside], whole[outside])


@given(st.data())
def test_mask_packer_and_flux_fill_conditioner(data):
    draw = data.draw
    image, mask = draw(images()), draw(masks())
    options = widgets(
        draw,
        grow=st.integers(-40, 40),
        feather=st.integers(0, 40),
        binarise=st.booleans(),
        invert=st.booleans(),
        policy=policies,
    )
    beside = {"image": image} if draw(st.booleans()) else {}
    packed = tried(NODES["DiptychMaskPacker"]().pack, mask=mask, **beside, **options)
    if packed is not None:
        tokens, seen, preview = packed["result"]
        assert tokens.shape[1] * 256 == seen.shape[1] * seen.shape[2] and preview.shape[:3] == seen.shape
        assert bool(((tokens >= 0) & (tokens <= 1)).all())
        if options.get("binarise", True) is True:
            assert set(seen.unique().tolist()) <= {0.0, 1.0}

    by_tokens = packed is not None and draw(st.booleans())
    conditioning = [[torch.zeros(1, 4, 8), {}]]
    made = tried(
        NODES["DiptychFluxFillConditioner"]().condition,
        positive=conditioning,
        negative=conditioning,
        vae=Vae(draw(st.sampled_from([16, 16, 16, 4]))),
        image=image,
        **({"mask_tokens": packed["result"][0]} if by_tokens else {"mask": mask}),
        model=draw(st.sampled_from([None, SimpleNamespace(), SimpleNamespace(model=None)])),
        noise_mask=draw(st.booleans()),
        **widgets(draw, policy=policies),
    )
    assert conditioning == [[conditioning[0][0], {}]]
    if made is None:
        return
    values, latent = made[0][0][1], made[2]
    count, height, width = len(values["concat_mask"]), *values["concat_mask"].shape[2:]
    assert (
        values["concat_latent_image"].shape == latent["samples"].shape == (count, 16, height // 8, width // 8)
    )
    assert bool(values["concat_mask"].flatten(1).any(dim=1).all())


@given(st.data())
def test_kontext_conditioner(data):
    draw = data.draw
    image = draw(images())
    further = {name: draw(images()) for name in ("image_2", "image_3") if draw(st.integers(0, 3)) == 0}
    mask = draw(st.none() | masks())
    options = widgets(
        draw,
        policy=policies,
        reference_method=st.sampled_from(["auto", "offset", "index", "uxo"]),
        batch=st.sampled_from(["edits", "references"]),
        megapixels=st.floats(0.05, 0.2),
    )
    options["size_policy"] = draw(st.sampled_from(["keep", "keep", "keep", "megapixels"]))
    options.setdefault("megapixels", 0.05)
    made = tried(
        NODES["DiptychKontextConditioner"]().condition,
        conditioning=[[torch.zeros(1, 4, 8), {}]],
        vae=Vae(draw(st.sampled_from([16, 16, 16, 128]))),
        image=image,
        mask=mask,
        **further,
        **options,
    )
    if made is None:
        return
    conditioning, latent, layout = made
    references = conditioning[0][1]["reference_latents"]
    assert all(reference.shape[1] == 16 and bool(reference.isfinite().all()) for reference in references)
    assert latent["samples"].shape[1:] == references[0].shape[1:] and str(layout)
    if "noise_mask" in latent:
        assert bool(latent["noise_mask"].flatten(1).any(dim=1).all())
    if layout.policy == "stretch" and options.get("policy", "auto") == "auto":
        assert dp.geometry.distortion(layout.source_size, layout.panel_size) <= 1.05
