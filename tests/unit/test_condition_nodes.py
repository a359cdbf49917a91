"""The core nodes without ComfyUI: what reaches the model, what is refused, what stays untouched."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from comfyui_diptych.models import geometry, packing
from comfyui_diptych.models.diptych import Layout
from comfyui_diptych.nodes.conditioning import DiptychFluxFillConditioner, DiptychKontextConditioner
from comfyui_diptych.nodes.diptych import DiptychBuilder, DiptychSplit
from comfyui_diptych.nodes.masks import DiptychMaskPacker


class FakeVAE:
    """8x average pooling into 16 channels, which keeps what was encoded readable; counts its calls."""

    def __init__(self):
        self.encoded = []

    def encode(self, image):
        assert image.shape[1] % 16 == image.shape[2] % 16 == 0 and image.shape[3] == 3
        self.encoded.append(image)
        pooled = F.avg_pool2d(image.movedim(-1, 1), 8)
        return pooled[:, torch.arange(16) % 3].contiguous()


def random_image(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(**options):
    return [[random_image(1, 4, 8), {"pooled_output": random_image(1, 8), **options}]]


def fill(image, mask=None, vae=None, **options):
    return DiptychFluxFillConditioner().condition(
        prompt(guidance=50.0), prompt(), vae or FakeVAE(), image, mask, **options
    )


def kontext(image, conditioning=None, **options):
    return DiptychKontextConditioner().condition(conditioning or prompt(), FakeVAE(), image, **options)


def model_with(inputs=None, **config):
    inner = SimpleNamespace(model_config=SimpleNamespace(unet_config=config))
    if inputs:
        inner.diffusion_model = SimpleNamespace(img_in=torch.nn.Linear(inputs, 8))
    return SimpleNamespace(model=inner)


def test_fill_gives_the_model_gray_under_a_hard_four_dimensional_mask():
    image, mask, vae = random_image(1, 32, 64, 3), torch.rand(1, 32, 64), FakeVAE()
    positive, negative, latent = fill(image, mask, vae)
    hard = (mask >= 0.5).float()
    for conditioning in (positive, negative):
        values = conditioning[0][1]
        assert torch.equal(values["concat_mask"], hard[:, None])
        assert values["concat_latent_image"].shape == (1, 16, 4, 8)
    masked, original = vae.encoded
    assert bool((masked[hard == 1] == 0.5).all()) and torch.equal(masked[hard == 0], image[hard == 0])
    assert torch.equal(original, image) and set(latent) == {"samples"}
    assert positive[0][1]["guidance"] == 50.0 and "pooled_output" in negative[0][1]


@pytest.mark.parametrize("policy, size", [("stretch", (48, 96)), ("crop", (32, 80)), ("pad", (48, 96))])
def test_fill_makes_both_sides_multiples_of_16(policy, size):
    positive, _, latent = fill(random_image(1, 43, 91, 4), torch.ones(1, 20, 30), policy=policy)
    assert positive[0][1]["concat_mask"].shape == (1, 1, *size)
    assert latent["samples"].shape[-2:] == (size[0] // 8, size[1] // 8)


@pytest.mark.parametrize("images, masks", [(1, 1), (1, 3), (3, 1), (3, 2), (2, 4)])
def test_fill_repeats_unequal_batches(images, masks):
    image, mask = random_image(images, 32, 32, 3), random_image(masks, 32, 32)
    positive, _, latent = fill(image, mask, noise_mask=True)
    batch, values = max(images, masks), positive[0][1]
    assert len(latent["samples"]) == len(latent["noise_mask"]) == batch
    assert len(values["concat_mask"]) == len(values["concat_latent_image"]) == batch
    for i in range(batch):
        alone = fill(image[i % images][None], mask[i % masks][None])[0][0][1]
        assert torch.equal(values["concat_latent_image"][i], alone["concat_latent_image"][0])
        assert torch.equal(values["concat_mask"][i], alone["concat_mask"][0])


def test_fill_takes_mask_tokens_as_they_are():
    image, soft = random_image(1, 32, 48, 3), random_image(1, 32, 48, seed=3)
    hard_tokens, seen, _ = packed(soft)
    by_mask, by_tokens = fill(image, soft)[0][0][1], fill(image, mask_tokens=hard_tokens)[0][0][1]
    assert torch.equal(by_mask["concat_mask"], by_tokens["concat_mask"])
    assert torch.equal(by_mask["concat_latent_image"], by_tokens["concat_latent_image"])
    soft_tokens = packed(soft, binarise=False)[0]
    assert torch.equal(fill(image, mask_tokens=soft_tokens)[0][0][1]["concat_mask"][:, 0], soft)
    assert torch.equal(by_mask["concat_mask"][:, 0], seen)


@pytest.mark.parametrize("model", [None, model_with(384), model_with(in_channels=96), SimpleNamespace()])
def test_fill_accepts_a_fill_model_and_what_it_cannot_know(model):
    fill(random_image(1, 16, 16, 3), torch.ones(1, 16, 16), model=model)


@pytest.mark.parametrize("model, channels", [(model_with(64), 64), (model_with(in_channels=16), 64)])
def test_fill_refuses_another_model_before_encoding(model, channels):
    vae = FakeVAE()
    with pytest.raises(ValueError, match=f"model takes {channels} input channels, so it is not FLUX.1-Fill"):
        fill(random_image(1, 16, 16, 3), torch.ones(1, 16, 16), vae, model=model)
    assert not vae.encoded


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "neither of mask and mask_tokens"),
        ({"mask": torch.ones(1, 32, 32), "mask_tokens": torch.ones(1, 4, 256)}, "both mask and mask_tokens"),
        ({"mask_tokens": torch.ones(1, 6, 256)}, "6 tokens but the 32x32 image needs 4"),
        ({"mask_tokens": torch.ones(1, 4, 64)}, "1, 4, 64"),
        ({"mask": torch.ones(1, 3, 32, 32)}, "mask has shape"),
    ],
)
def test_fill_says_what_is_wrong_with_the_mask(options, words):
    with pytest.raises(ValueError, match=words):
        fill(random_image(1, 32, 32, 3), **options)


def packed(*args, **inputs):
    """(tokens, mask, preview) of Mask Packer."""
    return DiptychMaskPacker().pack(*args, **inputs)["result"]


def test_packer_shows_every_channel_of_what_the_model_sees():
    mask = random_image(2, 30, 50)
    tokens, seen, preview = packed(mask)
    assert seen.shape == (2, 32, 48) and set(seen.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(tokens, packing.pack_mask(seen)) and tokens.shape == (2, 6, 256)
    assert preview.shape == (2, 32, 48, 3) and preview.is_contiguous()
    for channel in (0, 17, 255):
        row, column = divmod(channel, 16)
        tile = preview[:, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3, 0]
        assert torch.equal(tile.reshape(2, 6), tokens[..., channel])


def test_packer_options_do_what_they_say():
    mask = torch.zeros(1, 64, 64)
    mask[:, 24:40, 24:40] = 1
    pack = packed
    assert torch.equal(pack(mask)[1], mask) and torch.equal(pack(mask, invert=True)[1], 1 - mask)
    assert pack(mask, grow=8)[1][0, 32].sum() == 32 and pack(mask, grow=-4)[1][0, 32].sum() == 8
    assert torch.equal(pack(mask, feather=8)[1], mask)
    soft = pack(mask, feather=8, binarise=False)[1]
    assert 0 < soft[0, 32, 22] < 0.5 < soft[0, 32, 25] < 1
    assert pack(mask, image=random_image(1, 100, 133, 3))[1].shape == (1, 96, 128)
    assert torch.equal(pack(mask * 0.4)[1], torch.zeros_like(mask))
    assert torch.equal(pack(mask * 0.4, binarise=False)[1], mask * 0.4)


def test_packer_and_fill_conditioner_agree_on_the_size_under_every_policy():
    image, mask = random_image(1, 41, 75, 3), random_image(1, 20, 30)
    for policy in geometry.POLICIES:
        tokens = packed(mask, image, policy=policy)[0]
        by_tokens = fill(image, mask_tokens=tokens, policy=policy)[0][0][1]["concat_mask"]
        assert torch.equal(by_tokens, fill(image, mask, policy=policy)[0][0][1]["concat_mask"])


@pytest.mark.parametrize("size", [(1080, 1920), (300, 200), (64, 64)])
def test_kontext_uses_the_nearest_trained_size_and_split_undoes_it(size):
    image = random_image(1, *size, 3)
    conditioning, latent, layout = kontext(image)
    height, width = geometry.kontext_size(size)
    references = conditioning[0][1]["reference_latents"]
    assert len(references) == 1 and references[0].shape == (1, 16, height // 8, width // 8)
    assert torch.equal(latent["samples"], references[0]) and "noise_mask" not in latent
    edited, _ = DiptychSplit().split(torch.rand(1, height, width, 3), layout)
    assert edited.shape == image.shape


@pytest.mark.parametrize("policy", geometry.POLICIES)
def test_kontext_mask_inpaints_and_leaves_the_rest_exact(policy):
    image, mask = random_image(1, 70, 90, 4), torch.zeros(1, 70, 90)
    mask[:, 20:40, 20:60] = 1
    _, latent, layout = kontext(image, mask=mask, size_policy="keep", policy=policy)
    height, width = layout.panel_size
    assert latent["noise_mask"].shape == (1, 1, height, width)
    edited, _ = DiptychSplit().split(torch.zeros(1, height, width, 3), layout)
    assert torch.equal(edited[mask == 0], image[mask == 0]) and not edited[mask == 1][:, :3].any()


def test_kontext_takes_several_references_and_chains():
    first, latent, _ = kontext(
        random_image(1, 64, 64, 3), image_2=random_image(1, 32, 48, 3), size_policy="keep"
    )
    assert [tuple(x.shape[-2:]) for x in first[0][1]["reference_latents"]] == [(8, 8), (4, 6)]
    assert "reference_latents_method" not in first[0][1]
    second, _, _ = kontext(random_image(1, 16, 16, 3), first, size_policy="keep", reference_method="index")
    assert [tuple(x.shape[-2:]) for x in second[0][1]["reference_latents"]] == [(8, 8), (4, 6), (2, 2)]
    assert second[0][1]["reference_latents_method"] == "index"
    assert len(first[0][1]["reference_latents"]) == 2


def test_kontext_batches_are_edits_or_references():
    images = random_image(3, 32, 32, 3)
    conditioning, latent, _ = kontext(images, size_policy="keep", image_2=random_image(1, 32, 32, 3))
    assert [len(x) for x in conditioning[0][1]["reference_latents"]] == [3, 1] and len(latent["samples"]) == 3
    conditioning, latent, layout = kontext(images, size_policy="keep", batch="references")
    assert [len(x) for x in conditioning[0][1]["reference_latents"]] == [1, 1, 1]
    assert len(latent["samples"]) == len(layout.source) == 1
    _, latent, _ = kontext(images[:1], size_policy="keep", image_2=images)
    assert len(latent["samples"]) == 3


def test_kontext_megapixels_sets_the_area():
    _, latent, layout = kontext(random_image(1, 100, 200, 3), size_policy="megapixels", megapixels=0.25)
    height, width = layout.panel_size
    assert isinstance(layout, Layout) and height * width == pytest.approx(2**18, rel=0.05)
    assert latent["samples"].shape[-2:] == (height // 8, width // 8)


@pytest.mark.parametrize(
    "options, words",
    [({"size_policy": "big"}, "size is 'big'"), ({"policy": "fit"}, "policy is 'fit'")],
)
def test_kontext_says_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        kontext(random_image(1, 32, 32, 3), **options)


def test_an_edit_needs_words_and_a_plain_fill_none():
    image = torch.rand(1, 32, 32, 3)
    with pytest.raises(ValueError, match="instruction is empty: say what to change"):
        DiptychBuilder().build(image, " \n")
    assert DiptychBuilder().build(image, "", torch.ones(1, 32, 32), side="none", panel_width=32)[2] == ""


def test_a_whole_edit_through_the_nodes_returns_the_source_outside_the_mask():
    image, mask = random_image(2, 75, 101, 4), torch.zeros(1, 75, 101)
    mask[:, 10:30, 40:80] = 1
    diptych, diptych_mask, text, layout = DiptychBuilder().build(image, "make it red", mask, panel_width=64)
    assert text.endswith("but make it red")
    _, _, latent = fill(diptych, diptych_mask)
    assert latent["samples"].shape == (2, 16, 6, 16)
    edited, beside = DiptychSplit().split(torch.zeros_like(diptych), layout, feather=3)
    outside = mask.expand(2, -1, -1) == 0
    assert torch.equal(edited[outside], image[outside]) and beside.shape == edited.shape == image.shape


def test_an_empty_mask_means_the_whole_image():
    """Load Image gives an empty 64x64 mask for an image without alpha."""
    image, empty = random_image(1, 32, 32, 3), torch.zeros(1, 64, 64)
    diptych, mask, _, layout = DiptychBuilder().build(image, "x", empty, panel_width=32)
    assert bool((mask[:, :, 32:] == 1).all())
    assert not DiptychSplit().split(torch.zeros_like(diptych), layout, mask=empty)[0].any()
    assert "noise_mask" not in kontext(image, mask=empty, size_policy="keep")[1]


def digest(value):
    """A hash over every tensor, list and dict within a value."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes() + str(value.shape).encode()).hexdigest()
    if isinstance(value, dict):
        return tuple((key, digest(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)) and not isinstance(value, str):
        return tuple(digest(item) for item in value)
    return repr(value)


def test_no_node_changes_what_it_is_given():
    image, mask = random_image(2, 45, 70, 4), random_image(1, 45, 70)
    conditioning = prompt(reference_latents=[random_image(1, 16, 4, 4)])
    given = (image, mask, conditioning)
    before = digest(given)
    diptych, diptych_mask, _, layout = DiptychBuilder().build(image, "x", mask, second_panel="gray")
    tokens = packed(mask, image, grow=3, feather=4, binarise=False, invert=True)[0]
    outputs = (diptych, diptych_mask, tokens)
    after_build = digest(outputs)
    for paste in ("panel", "mask", "changed"):
        edited, beside = DiptychSplit().split(diptych, layout, image, mask, paste=paste, feather=2, grow=1)
        edited.mul_(0), beside.mul_(0)
    for options in ({"mask": mask}, {"mask_tokens": tokens}):
        positive, _, latent = DiptychFluxFillConditioner().condition(
            conditioning, conditioning, FakeVAE(), image, noise_mask=True, **options
        )
        latent["samples"].mul_(0)
    extended, latent, _ = kontext(image, conditioning, mask=mask, image_2=image, reference_method="index")
    latent["samples"].mul_(0)
    assert digest(given) == before and digest(outputs) == after_build
    assert bool(extended[0][1]["reference_latents"][1].any())


@pytest.mark.parametrize(
    "node",
    [DiptychBuilder, DiptychSplit, DiptychMaskPacker, DiptychFluxFillConditioner, DiptychKontextConditioner],
)
def test_every_input_and_output_says_what_it_is(node):
    inputs = {name: spec for group in node.INPUT_TYPES().values() for name, spec in group.items()}
    assert all(spec[1]["tooltip"].endswith(".") for spec in inputs.values())
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
    names = getattr(node, node.FUNCTION).__code__.co_varnames
    assert set(inputs) <= set(names)


def test_an_empty_mask_is_refused_where_a_mask_is_needed():
    image, vae = random_image(2, 32, 32, 3), FakeVAE()
    one = torch.zeros(2, 32, 32)
    one[0, 3, 3] = 1
    for mask, words in ((torch.zeros(1, 64, 64), "mask is empty"), (one, "mask 2 of 2 is empty")):
        with pytest.raises(ValueError, match=words):
            fill(image, mask, vae)
        with pytest.raises(ValueError, match="mask_tokens are of an empty mask"):
            fill(image, vae=vae, mask_tokens=packed(mask, image)[0])
    assert not vae.encoded


def test_a_mask_that_is_nowhere_a_half_is_never_taken_without_a_word():
    image, faint = random_image(1, 32, 32, 3), torch.full((1, 32, 32), 0.4)
    for call in (
        lambda: DiptychBuilder().build(image, "x", faint, panel_width=32),
        lambda: fill(image, faint),
        lambda: kontext(image, mask=faint),
        lambda: DiptychSplit().split(
            random_image(1, 32, 64, 3), DiptychBuilder().build(image, "x")[3], mask=faint
        ),
    ):
        with pytest.raises(ValueError, match="nowhere 0.5 or more"):
            call()


def test_in_a_batch_every_mask_counts_by_itself():
    image, masks = random_image(2, 32, 32, 3), torch.zeros(2, 32, 32)
    masks[0, 3:9, 3:9] = 1
    both = DiptychBuilder().build(image, "x", masks, panel_width=32)
    for i in range(2):
        alone = DiptychBuilder().build(image[i : i + 1], "x", masks[i : i + 1], panel_width=32)
        assert torch.equal(both[1][i], alone[1][0])
        paste = torch.zeros_like(both[0])
        edited = DiptychSplit().split(paste, both[3], mask=masks.flip(0))[0]
        own = DiptychSplit().split(paste[i : i + 1], alone[3], mask=masks.flip(0)[i : i + 1])[0]
        assert torch.equal(edited[i], own[0])


@pytest.mark.parametrize("node", [lambda *a, **k: fill(a[0], torch.ones(1, 64, 64), a[1]), None])
@pytest.mark.parametrize("channels", [4, 128])
@pytest.mark.parametrize("known", [True, False])
def test_a_vae_of_another_model_is_one_sentence(node, channels, known):
    class OtherVAE(FakeVAE):
        def encode(self, image):
            return super().encode(image)[:, :1].expand(-1, channels, -1, -1)

    vae = OtherVAE()
    if known:  # ComfyUI's VAE says how many
        vae.latent_channels = channels
    with pytest.raises(ValueError, match=f"vae makes latents of {channels} channels but FLUX.1 takes 16"):
        if node:
            node(random_image(1, 64, 64, 3), vae)
        else:
            DiptychKontextConditioner().condition(prompt(), vae, random_image(1, 64, 64, 3))
    assert not known or not vae.encoded


def test_a_stroke_of_one_pixel_reaches_the_model_through_every_node():
    image, mask = random_image(1, 64, 64, 3), torch.zeros(1, 640, 640)
    mask[:, :, 333] = 1
    column = 333 // 10
    built = DiptychBuilder().build(image, "x", mask, panel_width=32)[1]
    assert bool(built[:, :, 32 + column // 2].all())
    assert bool(fill(image, mask)[0][0][1]["concat_mask"][..., column].all())
    assert bool(packed(mask, image)[1][..., column].all())
    _, latent, layout = kontext(image, mask=mask, size_policy="keep")
    assert bool(latent["noise_mask"][..., column].all())
    edited, _ = DiptychSplit().split(torch.zeros(1, 64, 64, 3), layout)
    assert not edited[:, :, column].any() and torch.equal(edited[:, :, :column], image[:, :, :column])


def test_soft_tokens_are_clamped_and_nan_is_refused():
    image = random_image(1, 32, 32, 3)
    wild = torch.full((1, 32, 32), 3.0)
    wild[:, :16] = -2
    tokens, seen, _ = packed(wild, binarise=False)
    assert set(tokens.unique().tolist()) == set(seen.unique().tolist()) == {0.0, 1.0}
    given = fill(image, mask_tokens=packing.pack_mask(wild))[0][0][1]["concat_mask"]
    assert torch.equal(given[:, 0], seen)
    with pytest.raises(ValueError, match="mask holds NaN"):
        packed(torch.full((1, 32, 32), torch.nan), binarise=False)
    with pytest.raises(ValueError, match="mask_tokens holds NaN"):
        fill(image, mask_tokens=torch.full((1, 4, 256), torch.nan))
    with pytest.raises(ValueError, match="mask_tokens is a str"):
        fill(image, mask_tokens="x")


@pytest.mark.parametrize(
    "size, done",
    [
        ((1024, 1024), "1024x1024, as it is"),
        ((1080, 1920), "1920x1080, resized to 1392x752 (its aspect changes by 4.1%)"),
        ((926, 1000), "1000x926, cropped to 926x926, resized to 1024x1024"),
        ((300, 1200), "1200x300, resized to 1568x392, padded to 1568x672"),
    ],
)
def test_kontext_says_how_it_sized_the_image(size, done, caplog):
    with caplog.at_level("INFO"):
        _, _, layout = kontext(torch.full((1, *size, 3), 0.5))
    assert str(layout) == done and done in caplog.text


def test_a_mask_that_crop_leaves_nothing_of_is_refused():
    """Found by tests/fuzz."""
    image, mask = random_image(1, 40, 80, 3), torch.zeros(1, 40, 80)
    mask[:, :2] = 1
    for call in (
        lambda: DiptychBuilder().build(image, "x", mask, panel_width=0, policy="crop"),
        lambda: fill(image, mask, policy="crop"),
        lambda: kontext(image, mask=mask, size_policy="keep", policy="crop"),
    ):
        with pytest.raises(ValueError, match="mask lies wholly in the borders that policy crop leaves out"):
            call()
