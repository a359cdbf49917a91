"""glid in ComfyUI: recognised, told of what is known, sampled as the shell samples it."""

from __future__ import annotations

import json
import shutil

import torch

from . import SkipCase, case
from .two_hosts import assert_same_image, random_image

PROMPT = "a red circle"
SEED, STEPS = 7, 10


def folder(host):
    """A random tiny glid as a diffusers folder: the tiny SD inpainting's with a UNet of eight channels."""
    from diffusers import UNet2DConditionModel

    place = host.base.parent / "random_glid"
    if not place.is_dir():
        source = host.pack("models.tiny").folder() / "sd_inpaint"
        if not source.is_dir():
            raise SkipCase("the bundled tiny models are not there")
        shutil.copytree(source, place, ignore=shutil.ignore_patterns("unet"))
        config = json.loads((source / "unet" / "config.json").read_text(encoding="utf-8"))
        torch.manual_seed(0)
        UNet2DConditionModel.from_config({**config, "in_channels": 8}).save_pretrained(place / "unet")
    return place


def load(host):
    with torch.inference_mode():
        return host.pack("models.tiny.comfy").load(folder(host))


def shell(host):
    return host.pack("models.glid.model").Glid.load(folder(host), torch.float32, "cpu")


def graph_of(host, model, clip, vae, *, method, right, tiled, quirk=True):
    """(graph, reference of the decoded canvas, and of its canvas and mask)"""
    graph = host.graph()
    canvas, mask, *_ = graph.add(
        "DiptychOutpaintCanvas", image=graph.given(random_image(1, 64, 64)), right=right
    )
    positive, negative = (
        graph.add("CLIPTextEncode", clip=graph.given(clip), text=text)[0] for text in (PROMPT, "blue")
    )
    told = graph.add(
        "DiptychGlidConditioner",
        model=graph.given(model),
        positive=positive,
        negative=negative,
        vae=graph.given(vae),
        image=canvas,
        mask=mask,
    )
    patched, sampler, sigmas, *_ = graph.add(
        "DiptychGlidSampler", model=graph.given(model), method=method, steps=STEPS, glid_cfg=quirk
    )
    if tiled:
        sampler = graph.add(
            "DiptychTiledSampler", sampler=sampler, mask=told[3], window=64, stride=32, blend=16
        )[0]
    made = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=SEED)[0],
        guider=graph.add("CFGGuider", model=patched, positive=told[0], negative=told[1], cfg=4.0)[0],
        sampler=sampler,
        sigmas=sigmas,
        latent_image=told[2],
    )[0]
    image = graph.add("VAEDecode", samples=made, vae=graph.given(vae))[0]
    return graph.keep(image=image, canvas=canvas, mask=mask, told=told[3], sigmas=sigmas, latent=told[2])


SETTINGS = {
    "plms": {"method": "plms", "right": 32.0, "tiled": False},
    "ddim": {"method": "ddim", "right": 32.0, "tiled": False},
    "all channels guided": {"method": "plms", "right": 32.0, "tiled": False, "quirk": False},
    "tiles": {"method": "plms", "right": 128.0, "tiled": True},
}


@case(each=lambda: SETTINGS)
def the_shell_makes_the_same_image(host, setting):
    options = SETTINGS[setting]
    kept = host.run(graph_of(host, *load(host), **options)).kept
    denoiser = shell(host)
    denoiser.glid_cfg = options.get("quirk", True)
    how = {"negative": "blue", "cfg": 4.0, "sampler": options["method"], "steps": STEPS, "seed": SEED}
    if options["tiled"]:
        how |= {"window": 64, "stride": 32, "blend": 16}
    paint = host.pack("models.glid.paint").paint
    theirs = paint(denoiser, kept["canvas"].cpu().float(), kept["mask"].cpu(), PROMPT, **how)
    assert_same_image(host, kept["image"].cpu().float(), theirs)


@case
def both_branches_see_the_known_latents_and_exact_zeros(host):
    model, clip, vae = load(host)
    seen, unet = [], model.model.diffusion_model
    forward = type(unet).forward

    def watched(self, x, *arguments, **more):
        seen.append(x.clone())
        return forward(self, x, *arguments, **more)

    type(unet).forward = watched
    try:
        kept = host.run(graph_of(host, model, clip, vae, **SETTINGS["plms"])).kept
    finally:
        type(unet).forward = forward
    scale = model.model.latent_format.scale_factor
    with torch.no_grad():
        known = vae.encode(kept["canvas"][:, :, :64]) * scale
    torch.testing.assert_close(
        kept["latent"]["samples"][..., :8] * scale, known, rtol=0, atol=host.within(1e-5)
    )
    assert bool((kept["told"][..., 64:] == 1).all()) and not kept["told"][..., :64].any()
    assert sum(len(x) for x in seen) == 2 * (STEPS + 9)
    for x in seen:
        assert x.shape[1:] == (8, 8, 12)
        torch.testing.assert_close(
            x[:, 4:, :, :8].cpu(), known.expand(len(x), -1, -1, -1), rtol=0, atol=host.within(1e-6)
        )
        assert bool((x[:, 4:, :, 8:] == 0).all())


@case
def the_model_is_asked_at_half_steps_and_the_connected_one_stays_as_it_was(host):
    model, *_ = load(host)
    before = model.get_model_object("model_sampling")
    with torch.inference_mode():
        patched, sampler, sigmas = host.nodes["DiptychGlidSampler"]().build(model, "plms", 50)
    sampling, levels = patched.get_model_object("model_sampling"), sampler.levels
    assert len(sigmas) == 51 and float(sigmas[-1]) == 0 and bool((sigmas.diff() < 0).all())
    times = [float(sampling.timestep(torch.tensor([((1 - a) / a) ** 0.5]))) for a in levels.values()]
    assert times == list(levels) and 989.0 in levels
    assert {time % 1 for time in host.pack("samplers.plms").plms_levels(9)} == {0.0, 0.5}
    torch.testing.assert_close(float(sigmas[0]), float(before.sigma_max), rtol=1e-5, atol=0)
    assert model.get_model_object("model_sampling") is before
    assert "sampler_cfg_function" not in model.model_options


@case
def every_method_of_outpaint_paints_with_it(host):
    model, clip, vae = load(host)
    for method, width in (("direct", 96), ("mk2", 128)):
        graph = host.graph()
        text = graph.add("CLIPTextEncode", clip=graph.given(clip), text=PROMPT)[0]
        made = graph.add(
            "DiptychOutpaint",
            model=graph.given(model),
            positive=text,
            negative=text,
            vae=graph.given(vae),
            image=graph.given(random_image(1, 64, 64)),
            right=32,
            method=method,
            steps=3,
            window=64,
            mask_blur=1,
            seed=SEED,
            denoise=0.8,
        )[0]
        ours = host.run(graph.keep(image=made)).kept["image"].cpu().float()
        assert tuple(ours.shape) == (1, 64, width, 3)
        outpaint = host.pack("models.outpaint")
        sampling = host.pack("models.editing").Sampling(steps=3, seed=SEED)
        paint = host.pack("models.repaint").Painter(shell(host), PROMPT, sampling, 0.8, cfg=1.0)
        options = outpaint.Options(window=64, mask_blur=1, seed=SEED)
        sides = {"left": 0, "right": 32, "top": 0, "bottom": 0}
        assert_same_image(
            host, ours, outpaint.outpaint(paint, random_image(1, 64, 64), sides, method, options)
        )


@case
def the_loader_offers_the_bundled_one(host):
    node = host.nodes["DiptychTinyModelLoader"]
    assert "glid" in node.INPUT_TYPES()["required"]["which"][0]
    with torch.inference_mode():
        model, _, _ = node().load("glid")
    assert type(model.model).__name__ == "SD15_instructpix2pix"


def full_size():
    """(ComfyUI's UNet config of SD 1.5, its UNet of eight channels on the meta device)"""
    import comfy.ldm.modules.diffusionmodules.openaimodel as openai
    import comfy.ops
    import comfy.supported_models

    config = {
        "image_size": 32, "in_channels": 8, "out_channels": 4, "model_channels": 320,
        "num_res_blocks": [2] * 4,
        "channel_mult": [1, 2, 4, 4], "num_heads": 8, "use_spatial_transformer": True, "context_dim": 768,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "use_linear_in_transformer": False, "legacy": False,
    }  # fmt: skip
    build = openai.UNetModel
    return config, build, comfy.ops.disable_weight_init


@case(each=lambda: ["inpaint.pt", "with the checkpoint's prefix"])
def the_full_size_file_is_recognised_by_its_686_keys(host, form):
    import comfy.model_detection

    config, build, operations = full_size()
    state = build(**config, device="meta", operations=operations, dtype=torch.float32).state_dict()
    assert len(state) == 686 and sum(value.numel() for value in state.values()) == 859_532_484
    prefix = "" if form == "inpaint.pt" else "model.diffusion_model."
    found = comfy.model_detection.model_config_from_unet({prefix + k: v for k, v in state.items()}, prefix)
    assert type(found).__name__ == "SD15_instructpix2pix"
    wanted = {**config, **found.unet_config}
    wanted.pop("dtype", None)
    theirs = build(**wanted, device="meta", operations=operations, dtype=torch.float32).state_dict()
    assert theirs.keys() == state.keys()


UNET = {
    "in_channels": 4, "out_channels": 4, "sample_size": 8, "layers_per_block": 2, "attention_head_dim": 8,
    "block_out_channels": [32, 64, 128, 128], "cross_attention_dim": 64, "norm_num_groups": 32,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
VAE = {
    "block_out_channels": [32, 64, 128, 128], "layers_per_block": 2, "norm_num_groups": 32,
    "latent_channels": 4, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "scaling_factor": 0.18215, "sample_size": 64,
}  # fmt: skip


def autoencoder(width: int, device: str = "cpu"):
    """ComfyUI's AutoencoderKL of Stable Diffusion, `width` channels at its outermost (128 in full)."""
    import comfy.ldm.models.autoencoder as room

    sizes = {
        "double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": width,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    with torch.device(device):
        return room.AutoencoderKL(ddconfig=sizes, embed_dim=4)


def randomised(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(torch.randn(value.shape) * 0.05)
    return module.eval()


@case
def the_full_size_autoencoder_has_248_keys(host):
    assert len(autoencoder(128, "meta").state_dict()) == 248


@case
def glids_own_files_become_a_folder_that_the_shell_loads(host):
    """Narrow networks under LDM's names, as .pt files: ComfyUI's and the converted ones compute the same."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    config, build, operations = full_size()
    narrow = {**config, "model_channels": 32, "context_dim": 64}
    unet = randomised(build(**narrow, operations=operations, dtype=torch.float32))
    vae = randomised(autoencoder(32))
    place = host.base.parent / "glid_files"
    base = place / "sd15"
    shutil.copytree(folder(host), base, ignore=shutil.ignore_patterns("unet", "vae"), dirs_exist_ok=True)
    UNet2DConditionModel(**UNET).save_config(base / "unet")
    AutoencoderKL(**VAE).save_config(base / "vae")
    torch.save(unet.state_dict(), place / "inpaint.pt")
    torch.save(vae.state_dict(), place / "kl.pt")
    words = ["glid", "folder", place / "inpaint.pt", place / "kl.pt", base, "-o", place / "glid"]
    assert host.pack("cli").main(list(map(str, words))) == 0

    denoiser = host.pack("models.glid.model").Glid.load(place / "glid", torch.float32, "cpu")
    x, text, image = torch.randn(2, 8, 8, 8), torch.randn(2, 77, 64), torch.rand(1, 64, 64, 3)
    times = torch.tensor([500.0, 20.5])
    with torch.no_grad():
        expected = unet(x, times, context=text)
        made = denoiser.unet(x, times, encoder_hidden_states=text).sample
        moments = vae.quant_conv(vae.encoder(image.movedim(-1, 1) * 2 - 1))[:, :4] * 0.18215
        latents = denoiser.encode(image)
        shown = vae.decoder(vae.post_quant_conv(latents / 0.18215)).movedim(1, -1) / 2 + 0.5
    for one, other in ((made, expected), (latents, moments), (denoiser.decode(latents), shown.clamp(0, 1))):
        assert other.std() > 1e-3
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * max(1.0, float(other.abs().max())))
    torch.save({"input_blocks.0.0.weight": torch.zeros(4, 9, 3, 3)}, place / "wrong.pt")
    words[2] = place / "wrong.pt"
    assert host.pack("cli").main(list(map(str, words))) == 2


@case
def what_is_no_glid_is_refused_before_anything_is_encoded(host):
    with torch.inference_mode():
        model, _, vae = host.nodes["DiptychTinyModelLoader"]().load("fill")
        for run in (
            lambda: host.nodes["DiptychGlidSampler"]().build(model, "plms", 50),
            lambda: host.nodes["DiptychGlidConditioner"]().condition(
                model, [], [], None, torch.rand(1, 8, 8, 3), torch.ones(1, 8, 8)
            ),
        ):
            try:
                run()
            except ValueError as error:
                assert "without glid's four extra channels" in str(error)
            else:
                raise AssertionError("another model was taken")
