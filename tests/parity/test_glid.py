"""glid on diffusers modules, random tiny weights: what it is told, how it is guided, and the command line."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.commands import images
from comfyui_diptych.models.glid import known_latents
from comfyui_diptych.models.glid import paint as room
from comfyui_diptych.models.glid.model import Glid
from comfyui_diptych.models.outpaint import expand, fill, paste_back
from comfyui_diptych.models.sd_inpaint import SDInpaint

PROMPT = "a red circle"


@pytest.fixture(scope="session")
def folder(sd_inpaint_pipeline, tmp_path_factory):
    """The shared tiny pipeline with a random UNet of eight channels, as a diffusers folder."""
    from diffusers import UNet2DConditionModel

    place = tmp_path_factory.mktemp("glid") / "glid"
    sd_inpaint_pipeline.save_pretrained(place)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**sd_inpaint_pipeline.unet.config, "in_channels": 8})
    unet.save_pretrained(place / "unet")
    return place


@pytest.fixture(scope="session")
def denoiser(folder):
    return Glid.load(folder, torch.float32, "cpu")


@pytest.fixture
def canvas(random_image):
    made, mask, _ = expand(random_image(1, 64, 64), right=64)
    return fill(made, mask, "edge"), mask


def test_the_model_sees_the_scaled_latents_of_what_is_known_and_exact_zeros(denoiser, canvas, monkeypatch):
    image, mask = canvas
    seen, unet = [], denoiser.unet.forward
    monkeypatch.setattr(denoiser.unet, "forward", lambda x, *a, **k: seen.append(x) or unet(x, *a, **k))
    room.paint(denoiser, image, mask, PROMPT, negative="blue", steps=4)
    encoded = denoiser.encode(image[:, :, :64])  # the known part alone, scaled by the VAE's factor
    assert len(seen) == 4 + 9 and all(tuple(x.shape) == (2, 8, 8, 16) for x in seen)
    for x in seen:
        for half in x:  # the positive branch and the negative one
            torch.testing.assert_close(half[4:, :, :8], encoded[0], rtol=0, atol=1e-6)
            assert bool((half[4:, :, 8:] == 0).all())


def test_a_hole_zeroes_every_cell_that_it_touches(denoiser, random_image):
    image, mask = random_image(1, 64, 64), torch.zeros(1, 64, 64)
    mask[:, 17:30, 20:33] = 1
    latents, known = denoiser.known(image, mask)
    assert (~known[0, 0]).nonzero().tolist() == [[y, x] for y in (2, 3) for x in (2, 3, 4)]
    torch.testing.assert_close(latents, denoiser.encode(image) * known, rtol=0, atol=0)
    swapped = known_latents(denoiser.encode, image, 1 - mask, "keep")
    assert torch.equal(swapped[0], latents) and torch.equal(swapped[1], known)


def test_guidance_spares_the_fourth_channel_unless_told_otherwise(denoiser, canvas):
    text, negative = denoiser.encode_text(PROMPT), denoiser.encode_text("blue")
    x = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    alone = [denoiser.epsilon(x, 500, denoiser.condition(words, *canvas)) for words in (text, negative)]
    full = alone[1] + 3 * (alone[0] - alone[1])
    condition = denoiser.condition(text, *canvas, negative=negative, cfg=3.0)
    made = denoiser.epsilon(x, 500, condition)
    torch.testing.assert_close(made[:, :3], full[:, :3], rtol=0, atol=1e-5)
    torch.testing.assert_close(made[:, 3:], alone[0][:, 3:], rtol=0, atol=1e-5)
    plain = Glid(denoiser.unet, denoiser.vae, denoiser.tokenizer, denoiser.text_encoder)
    plain.glid_cfg = False
    torch.testing.assert_close(plain.epsilon(x, 500, condition), full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler, steps, calls", [("plms", 6, 15), ("ddim", 10, 10)])
def test_both_samplers_run_as_they_count(denoiser, canvas, monkeypatch, sampler, steps, calls):
    times, epsilon, told = [], denoiser.epsilon, []
    monkeypatch.setattr(
        denoiser,
        "epsilon",
        lambda x, time, condition: times.append(float(time)) or epsilon(x, time, condition),
    )
    report = {"callback": lambda step, count, x0: told.append((step, count))}
    made = room.paint(denoiser, *canvas, PROMPT, sampler=sampler, steps=steps, **report)
    assert made.shape == canvas[0].shape and bool(torch.isfinite(made).all())
    assert len(times) == calls and told == [(step, steps) for step in range(steps)]
    assert any(time % 1 for time in times) == (sampler == "plms")  # half steps between whole timesteps


def test_windows_know_what_came_before_and_keep_what_is_known(denoiser, canvas, monkeypatch):
    image, mask = canvas
    known, decoded = denoiser.known(image, mask)[0], []
    monkeypatch.setattr(denoiser, "decode", lambda latents: decoded.append(latents) or image)
    told, contexts = denoiser.told, []
    monkeypatch.setattr(
        denoiser, "told", lambda text, context, **k: contexts.append(context) or told(text, context, **k)
    )
    room.paint(denoiser, image, mask, PROMPT, steps=4, window=64)
    assert torch.equal(decoded[0][..., :8], known[..., :8])
    assert [int((x == 0).all(dim=1).sum()) for x in contexts] == [32, 32]  # half of each window
    assert torch.equal(contexts[1][..., 4:8] == 0, torch.ones(1, 4, 8, 4, dtype=torch.bool))
    assert bool((contexts[1][..., :4] != 0).any(dim=1).all())


def test_one_window_taken_whole_is_the_plain_way(denoiser, canvas):
    whole = room.paint(denoiser, *canvas, PROMPT, steps=4)
    options = {"window": 128, "known": "overwrite", "blend": 0}
    torch.testing.assert_close(
        room.paint(denoiser, *canvas, PROMPT, steps=4, **options), whole, rtol=0, atol=1e-6
    )


def test_the_command_line_paints_with_a_glid_folder(folder, tmp_path, random_image):
    photo, out = tmp_path / "photo.png", tmp_path / "out.png"
    images.to_pil(random_image(1, 48, 64)[0]).save(photo)
    image = images.load_image(photo)
    model = ["--model", folder, "--dtype", "float32", "--device", "cpu", "--steps", "4", "-o", out]
    for method in ("direct", "tiles", "mk2"):
        window = [] if method == "direct" else ["--window", 64]
        window += ["--mask-blur", 1] if method == "mk2" else []
        words = ["outpaint", photo, PROMPT, "--right", 64, "--method", method, *window, *model]
        assert cli.main(list(map(str, words))) == 0
        made = images.load_image(out)
        assert made.shape == (1, 48, 128, 3)
        assert torch.equal(
            made[:, :, : 64 - 24 * (method == "mk2")], image[:, :, : 64 - 24 * (method == "mk2")]
        )
    mask = torch.zeros(48, 64, 3)
    mask[16:32, 24:40] = 1
    images.to_pil(mask).save(tmp_path / "mask.png")
    words = [
        "inpaint",
        photo,
        PROMPT,
        "--mask",
        tmp_path / "mask.png",
        "--engine",
        "glid",
        "--plain-cfg",
        *model,
    ]
    assert cli.main(list(map(str, words))) == 0
    outside = mask[None] == 0
    made = images.load_image(out)
    assert torch.equal(made[outside], image[outside]) and not torch.equal(made, image)


def test_the_command_line_paints_windows_in_glids_own_order(folder, denoiser, tmp_path, random_image):
    photo, out = tmp_path / "photo.png", tmp_path / "out.png"
    images.to_pil(random_image(1, 48, 64)[0]).save(photo)
    image = images.load_image(photo)
    words = ["outpaint", photo, PROMPT, "--right", 64, "--model", folder, "--dtype", "float32", "-o", out]
    words += ["--device", "cpu", "--steps", 4, "--method", "tiles", "--window", 64, "--keep-colours"]
    canvas, mask, layout = expand(image, right=64, multiple=8)
    canvas, made = fill(canvas, mask, "edge"), {}
    for order in ("outward", "glid"):
        assert cli.main([*map(str, words), "--order", order]) == 0
        made[order] = images.load_image(out)
        painted = room.paint(denoiser, canvas, mask, PROMPT, steps=4, window=64, order=order)
        expected = paste_back(painted, image, layout)
        assert float((made[order] - expected).abs().max()) <= 0.5 / 255 + 1e-5
    assert float((made["glid"] - made["outward"]).abs().max()) > 0.02


@pytest.mark.parametrize(
    "words, message",
    [
        (["--engine", "sd_inpaint"], "has 8 input channels where SD inpainting has 9"),
        (["--guidance", "30"], "--guidance does nothing with --engine glid"),
    ],
)
def test_wrong_engines_and_options_are_one_sentence(folder, tmp_path, random_image, capsys, words, message):
    photo = tmp_path / "photo.png"
    images.to_pil(random_image(1, 48, 64)[0]).save(photo)
    words = ["outpaint", photo, PROMPT, "--right", 64, "--model", folder, "-o", tmp_path / "out.png", *words]
    assert cli.main(list(map(str, words))) == 2
    assert message in capsys.readouterr().err


def test_without_a_bundled_glid_the_engine_asks_for_a_folder(tmp_path, random_image, capsys, monkeypatch):
    monkeypatch.setenv("DIPTYCH_TINY_FOLDER", str(tmp_path))
    photo = tmp_path / "photo.png"
    images.to_pil(random_image(1, 48, 64)[0]).save(photo)
    words = ["outpaint", photo, PROMPT, "--right", 64, "--engine", "glid", "-o", tmp_path / "out.png"]
    assert cli.main(list(map(str, words))) == 2
    assert "no tiny glid model is bundled: give a folder with --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mask": torch.zeros(1, 64, 128)}, "mask is empty"),
        ({"mask": torch.ones(1, 8, 8)}, "mask is 8x8 but the image is 128x64"),
        ({"sampler": "euler"}, "sampler is 'euler'"),
        ({"steps": 3}, "steps is 3: PLMS takes 4"),
        ({"sampler": "ddim", "steps": 300}, "steps is 300"),
        ({"window": 60}, "window is 60 px"),
    ],
)
def test_what_glid_cannot_do_is_one_sentence(denoiser, canvas, change, words):
    given = {"image": canvas[0], "mask": canvas[1], "prompt": PROMPT, "steps": 4} | change
    with pytest.raises(ValueError, match=words):
        room.paint(denoiser, **given)


def test_the_wrong_unet_is_refused(denoiser, sd_inpaint_pipeline):
    with pytest.raises(ValueError, match="takes 9 channels but glid's 8"):
        Glid.from_pipeline(sd_inpaint_pipeline)
    with pytest.raises(ValueError, match="8 channels"):
        SDInpaint(denoiser.unet, denoiser.vae, denoiser.tokenizer, denoiser.text_encoder)
