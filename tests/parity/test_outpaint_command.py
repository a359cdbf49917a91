"""`diptych outpaint` and `diptych inpaint`, from images on disk to images on disk, on tiny models."""

from __future__ import annotations

import shutil

import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.commands import images, outpaint
from comfyui_diptych.models import editing
from comfyui_diptych.models.flux_fill import FluxFill
from comfyui_diptych.models.outpaint import Options, expand, fill, paste_back
from comfyui_diptych.models.outpaint import outpaint as outpaint_by
from comfyui_diptych.models.repaint import Painter
from comfyui_diptych.models.sd_inpaint import MaskRule, SDInpaint


@pytest.fixture(scope="session")
def models(fill_pipeline, sd_inpaint_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outpaint_models")
    fill_pipeline.save_pretrained(folder / "fill")
    sd_inpaint_pipeline.save_pretrained(folder / "sd_inpaint")
    return folder


@pytest.fixture
def photo(tmp_path, random_image):
    path = tmp_path / "photo.png"
    images.to_pil(random_image(1, 48, 64)[0]).save(path)
    return path


@pytest.fixture
def command(models, tmp_path):
    """Run a subcommand in float32 with two steps; returns the image it wrote."""

    def run(name: str, *words, engine: str = "fill") -> torch.Tensor:
        out = tmp_path / "out.png"
        model = ["--model", models / engine, "--dtype", "float32", "--device", "cpu", "--steps", "2"]
        assert cli.main([name, *map(str, [*words, *model, "-o", out])]) == 0
        assert (tmp_path / "out_side_by_side.png").is_file()
        return images.load_image(out)

    return run


def seen(image: torch.Tensor) -> torch.Tensor:
    """The image as 8 bits give it back."""
    return (image * 255).round() / 255


def test_the_image_returns_and_the_rest_is_what_the_rooms_make(command, photo, models):
    made = command("outpaint", photo, "a red circle", "--right", "50%", "--top=8", "--keep-colours")
    image = images.load_image(photo)
    assert made.shape == (1, 56, 96, 3) and torch.equal(made[:, 8:, :64], image)
    canvas, mask, layout = expand(image, right=32, top=8)
    canvas = fill(canvas, mask, "edge")
    denoiser = FluxFill.load(models / "fill", torch.float32, "cpu")
    result = editing.fill_canvas(denoiser, canvas, mask, "a red circle", sampling=editing.Sampling(steps=2))
    expected = paste_back(result, image, layout)
    assert float((made - seen(expected)).abs().max()) <= 1 / 255 + 1e-6


def test_sd_inpainting_outpaints_too_and_takes_an_aspect(command, photo):
    made = command(
        "outpaint", photo, "a red circle", "--aspect", "2:1", "--fill", "blur", engine="sd_inpaint"
    )
    assert made.shape == (1, 48, 96, 3)
    assert torch.equal(made[:, :, 16:80], images.load_image(photo))


@pytest.mark.parametrize("engine", ["fill", "sd_inpaint"])
def test_a_panorama_by_windows_keeps_the_image(command, photo, engine):
    words = ["--right", 96, "--method", "tiles", "--window", 64]
    made = command("outpaint", photo, "a red circle", *words, engine=engine)
    assert made.shape == (1, 48, 160, 3)
    assert torch.equal(made[:, :, :64], images.load_image(photo))


@pytest.mark.parametrize("engine", ["fill", "sd_inpaint"])
@pytest.mark.parametrize("method", ["mk2", "poor-man", "mosaic"])
def test_webuis_methods_are_those_of_the_room_on_the_same_model(command, photo, models, engine, method):
    words = [] if method == "mosaic" else ["--window", 64, "--mask-blur", 1]
    made = command("outpaint", photo, "a red circle", "--right=16", "--method", method, *words, engine=engine)
    loader = FluxFill if engine == "fill" else SDInpaint
    denoiser = loader.load(models / engine, torch.float32, "cpu")
    denoise = {"mk2": 0.8, "poor-man": 1.0, "mosaic": 0.9}[method]
    paint = Painter(denoiser, "a red circle", editing.Sampling(steps=2), denoise)
    options = Options(window=64, mask_blur=1 if words else None, multiple=16 if engine == "fill" else 8)
    sides = {"left": 0, "right": 16, "top": 0, "bottom": 0}
    expected = outpaint_by(paint, images.load_image(photo), sides, method.replace("-", " "), options)
    assert made.shape == (1, 48, 80 if method == "mosaic" else 128, 3)
    assert float((made - seen(expected)).abs().max()) <= 1 / 255 + 1e-6
    assert torch.equal(made[:, :, :40], images.load_image(photo)[:, :, :40])


def test_a_plain_model_outpaints_around_what_is_known(photo, models, tmp_path, capsys):
    from diffusers import UNet2DConditionModel

    folder = tmp_path / "sd"
    shutil.copytree(models / "sd_inpaint", folder)
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config({**config, "in_channels": 4}).save_pretrained(folder / "unet")
    words = ["outpaint", photo, "a red circle", "--right", 16, "--model", folder, "--steps", 2]
    words += ["--dtype", "float32", "--device", "cpu", "-o", tmp_path / "out.png"]
    assert cli.main(list(map(str, words))) == 0
    made = images.load_image(tmp_path / "out.png")
    assert made.shape == (1, 48, 80, 3) and torch.equal(made[:, :, :64], images.load_image(photo))
    assert cli.main(list(map(str, [*words, "--method", "tiles", "--window", 64]))) == 2
    assert "--engine sd knows no mask: use another --method than tiles" in capsys.readouterr().err


@pytest.mark.parametrize("size", [[], ["--size", "32"]], ids=["whole", "cropped"])
def test_inpainting_changes_nothing_outside_the_mask(command, photo, tmp_path, size):
    mask = torch.zeros(48, 64, 3)
    mask[20:30, 30:45] = 1
    images.to_pil(mask).save(tmp_path / "mask.png")
    made = command("inpaint", photo, "a red circle", "--mask", tmp_path / "mask.png", "--blend", 0, *size)
    image = images.load_image(photo)
    outside = mask[None] == 0
    assert torch.equal(made[outside], image[outside])
    assert float((made - image)[:, 20:30, 30:45].abs().mean()) > 0.01


def test_strength_and_the_way_of_the_mask_reach_sd_inpainting(command, photo, tmp_path, models):
    mask = torch.zeros(48, 64, 3)
    mask[20:30, 30:45] = 1
    images.to_pil(mask).save(tmp_path / "mask.png")
    words = ["--mask", tmp_path / "mask.png", "--blend", 0, "--keep-colours"]
    how = ["--strength", 0.5, "--mask-resize", "area"]
    made = command("inpaint", photo, "a red circle", *words, *how, engine="sd_inpaint")
    image = images.load_image(photo)
    denoiser = SDInpaint.load(models / "sd_inpaint", torch.float32, "cpu")
    expected = editing.inpaint_sd(
        denoiser,
        image,
        mask[None, ..., 0],
        "a red circle",
        strength=0.5,
        rule=MaskRule("area"),
        sampling=editing.Sampling(steps=2),
    )
    expected = torch.where(mask > 0, seen(expected), image)
    assert float((made - expected).abs().max()) <= 1 / 255 + 1e-6


@pytest.mark.parametrize(
    "words, message",
    [
        (["outpaint", "{photo}", "x"], "nothing is to be painted"),
        (["outpaint", "{photo}", " ", "--left", "8"], "the prompt is empty"),
        (["outpaint", "{photo}", "x", "--left=-70"], "nothing is to be painted"),
        (["outpaint", "{photo}", "x", "--left=-70", "--right=3"], "left is -70 and right is 3 px but"),
        (["outpaint", "{photo}", "x", "--left", "8", "--aspect", "2:1"], "--left and --aspect"),
        (["outpaint", "{photo}", "x", "--left", "8", "--fill", "magic"], "how is 'magic'"),
        (["outpaint", "{photo}", "x", "--left", "8", "--lama", "a.pt"], "--lama is for --fill lama"),
        (["outpaint", "{photo}", "x", "--left", "8", "--fill", "lama"], "fill 'lama' needs a LaMa file"),
        (["outpaint", "{photo}", "x", "--left", "8", "--cfg", "3"], "--cfg does nothing with --engine fill"),
        (["outpaint", "{photo}", "x", "--left", "8", "--window", "64"], "--window is for --method tiles"),
        (["outpaint", "{photo}", "x", "--left", "8", "--order", "glid"], "--order is for --method tiles"),
        (["outpaint", "{photo}", "x", "--left", "8", "--mask-blur", "2"], "--mask-blur is for --method mk2"),
        (["outpaint", "{photo}", "x", "--left=-8", "--top=8", "--method=mk2"], "left is -8: mk2 does not"),
        (["outpaint", "{photo}", "x", "--left", "8", "--method", "tiles"], "--window is 1024 but the canvas"),
        (["outpaint", "{tmp}/none.png", "x", "--left", "8"], "none.png does not exist"),
        (["inpaint", "{photo}", "x", "--mask", "{tmp}/small.png"], "mask is 8x8 but the image is 64x48"),
        (["inpaint", "{photo}", "x", "--mask", "{tmp}/black.png"], "mask is empty"),
        (
            ["inpaint", "{photo}", "x", "--mask", "{tmp}/small.png", "--strength", "0.5"],
            "--strength does nothing with --engine fill",
        ),
    ],
)
def test_wrong_input_is_one_sentence_before_a_model_is_loaded(
    words, message, photo, tmp_path, models, capsys, monkeypatch
):
    images.to_pil(torch.ones(8, 8, 3)).save(tmp_path / "small.png")
    images.to_pil(torch.zeros(48, 64, 3)).save(tmp_path / "black.png")
    monkeypatch.setattr(FluxFill, "load", classmethod(lambda *_: pytest.fail("a model was loaded")))
    words = [word.format(photo=photo, tmp=tmp_path) for word in words]
    assert cli.main([*words, "--model", str(models / "fill"), "-o", str(tmp_path / "out.png")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    "text, value",
    [("256", (256, "px")), ("-8", (-8, "px")), ("50%", (0.5, "fraction")), ("-25%", (-0.25, "fraction"))],
)
def test_amounts(text, value):
    assert outpaint.amount(text) == value


@pytest.mark.parametrize("option, text", [("--left", "8.5"), ("--left", "wide"), ("--aspect", "16:0")])
def test_amounts_that_are_none_are_refused_in_one_line(option, text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["outpaint", "a.png", "x", option, text])
    error = capsys.readouterr().err
    assert f"{option}: it is '{text}'" in error and error.count("\n") == 1
