"""Plain Stable Diffusion, with and without a ControlNet, inpaints as diffusers' pipelines do."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.commands import images
from comfyui_diptych.models import control_inpaint
from comfyui_diptych.models.editing import Sampling
from comfyui_diptych.models.outpaint import fill
from comfyui_diptych.models.sd_blend import SDBlend, inpaint_blend

PROMPTS = ["make the sky red", "remove the cat"]


@pytest.fixture(scope="session")
def parts(sd_inpaint_pipeline):
    """A four-channel pipeline's modules, and a ControlNet of random weights, its zero layers too."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(4)
    unet = UNet2DConditionModel.from_config({**sd_inpaint_pipeline.unet.config, "in_channels": 4}).eval()
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16, 32)).eval()
    with torch.no_grad():
        for parameter in control.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.2)
    names = ("vae", "text_encoder", "tokenizer", "scheduler")
    return {name: getattr(sd_inpaint_pipeline, name) for name in names} | {"unet": unet}, control


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "controlnet"])
def pipeline(request, parts):
    import diffusers

    modules, control = parts
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if request.param:
        made = diffusers.StableDiffusionControlNetInpaintPipeline(**modules, controlnet=control, **checker)
    else:
        made = diffusers.StableDiffusionInpaintPipeline(**modules, **checker)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("posterior", ["mode", "sample"])
@pytest.mark.parametrize(("batch", "strength"), [(1, 1.0), (2, 0.6)])
def test_it_equals_the_pipelines(pipeline, random_image, request, posterior, batch, strength):
    if posterior == "mode":
        request.getfixturevalue("mode_posterior")
    control = getattr(pipeline, "controlnet", None)
    image = random_image(batch, 64, 96)
    mask = (torch.rand(batch, 64, 96, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    mask[:, :, :30] = 0
    hint = torch.where(mask[..., None] > 0.5, -1.0, image)
    extra = (
        {}
        if control is None
        else {"control_image": hint.movedim(-1, 1), "controlnet_conditioning_scale": 0.8}
    )
    expected = pipeline(
        prompt=PROMPTS[:batch],
        negative_prompt=["blue"] * batch,
        image=image.movedim(-1, 1),
        mask_image=mask[:, None],
        height=64,
        width=96,
        num_inference_steps=5,
        guidance_scale=7.5,
        strength=strength,
        generator=torch.Generator().manual_seed(4),
        output_type="pt",
        **extra,
    ).images.movedim(1, -1)
    ours = inpaint_blend(
        SDBlend.from_pipeline(pipeline, controlnet=control),
        image,
        mask,
        PROMPTS[:batch],
        negative="blue",
        strength=strength,
        scale=0.8,
        mask_resize="nearest",
        sampling=Sampling(5, seed=4, posterior=posterior),
    )
    assert ours.std() > 0.02
    assert (ours - expected).abs().max() <= 1e-5


def test_the_controlnet_changes_the_image_and_known_latents_do_not(parts, random_image):
    modules, control = parts
    image, mask = random_image(1, 64, 64), torch.zeros(1, 64, 64)
    mask[:, :, 40:] = 1
    results = {}
    for name, net in (("plain", None), ("controlled", control)):
        denoiser = SDBlend(
            modules["unet"], modules["vae"], modules["tokenizer"], modules["text_encoder"], controlnet=net
        )
        seen = []
        decode = denoiser.decode
        denoiser.decode = lambda x0, seen=seen, decode=decode: (seen.append(x0), decode(x0))[1]
        results[name] = inpaint_blend(denoiser, image, mask, "a cat", sampling=Sampling(3))
        known = control_inpaint.cells(mask) == 0
        assert known[0, 0, 0].tolist() == [True] * 4 + [False] * 4  # one cell more than the mask
        torch.testing.assert_close(seen[0][..., :4], denoiser.encode(image)[..., :4], rtol=0, atol=1e-5)
    assert (results["plain"] - results["controlled"])[:, :, 48:].abs().max() > 1e-3


def test_an_inpainting_model_is_refused(sd_inpaint_pipeline):
    with pytest.raises(ValueError, match="takes 9 channels but a plain model 4"):
        SDBlend.from_pipeline(sd_inpaint_pipeline)


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory):
    """A plain pipeline's folder and a ControlNet's."""
    from diffusers import StableDiffusionPipeline

    modules, control = parts
    root = tmp_path_factory.mktemp("plain")
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**modules, **checker).save_pretrained(root / "sd")
    control.save_pretrained(root / "controlnet")
    return root


def test_the_command_inpaints_with_a_plain_model(folders, tmp_path, random_image, capsys):
    photo, mask = random_image(1, 48, 64), torch.zeros(48, 64, 3)
    mask[16:40, 24:56] = 1
    images.to_pil(photo[0]).save(tmp_path / "photo.png")
    images.to_pil(mask).save(tmp_path / "mask.png")
    fixed = [
        "--mask",
        tmp_path / "mask.png",
        "--blend",
        0,
        "--keep-colours",
        "--steps",
        4,
        "--dtype",
        "float32",
    ]
    fixed += ["--device", "cpu", "--model", folders / "sd", "-o", tmp_path / "out.png"]

    def run(*more, command="inpaint"):
        words = [command, tmp_path / "photo.png", "a cat", *fixed, *more]
        return cli.main([str(word) for word in words])

    more = ["--controlnet", folders / "controlnet", "--control-scale", 0.7]
    assert run(*more, "--prefill", "blur", "--strength", 0.75) == 0
    image, hole = images.load_image(tmp_path / "photo.png"), mask[None, ..., 0]
    expected = inpaint_blend(
        SDBlend.load(folders / "sd", torch.float32, "cpu", folders / "controlnet"),
        image,
        hole,
        "a cat",
        filled=fill(image, hole, "blur"),
        scale=0.7,
        strength=0.75,
        sampling=Sampling(4),
    )
    made = images.load_image(tmp_path / "out.png")
    assert float((made - torch.where(mask > 0, expected, image)).abs().max()) <= 1.01 / 255
    for words, message in (
        (["--control-scale", "2"], "--control-scale needs --controlnet"),
        (["--prefill", "magic"], "--prefill is 'magic'"),
        (["--prefill", "lama"], "--lama is None: give LaMa's file"),
        (["--task", "remove"], "--task does nothing with --engine sd"),
        (["--guidance", "3"], "--guidance does nothing with --engine sd"),
    ):
        assert run(*words) == 2
        assert message in capsys.readouterr().err
