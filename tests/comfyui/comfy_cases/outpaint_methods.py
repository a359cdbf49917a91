"""Outpaint in ComfyUI: every method gives the shell's image from the same weights and seed."""

from __future__ import annotations

import json
import shutil

import torch

from . import SkipCase, case
from .two_hosts import assert_same_image, random_image

PROMPT = "a red circle"
SETTINGS = {  # method, cfg, denoise, node's widgets
    "direct": ("direct", 1.0, {}),
    "tiles": ("tiles", 1.0, {"window": 64}),
    "mk2": ("mk2", 0.8, {"window": 64, "mask_blur": 1}),
    "poor man": ("poor man", 0.8, {"window": 64, "mask_blur": 2}),
    "mosaic": ("mosaic", 0.9, {}),
}
STEPS, SEED = 4, 11


def settings():
    made = [f"{which} {name}" for which in ("fill", "sd_inpaint") for name in SETTINGS]
    return [name for name in made if name != "sd_inpaint tiles"]


def load(host, which: str):
    if not host.pack("models.tiny").card().get("trained"):
        raise SkipCase("the bundled tiny models are not trained yet")
    with torch.inference_mode():
        return host.nodes["DiptychTinyModelLoader"]().load(which)


def graph_of(host, which: str, image, **widgets):
    graph = host.graph()
    model, clip, vae, *_ = graph.add("DiptychTinyModelLoader", which=which)
    positive, negative = (graph.add("CLIPTextEncode", clip=clip, text=text)[0] for text in (PROMPT, ""))
    if which == "fill":
        positive = graph.add("FluxGuidance", conditioning=positive, guidance=30.0)[0]
    given = {"model": model, "positive": positive, "negative": negative, "vae": vae}
    made = graph.add("DiptychOutpaint", image=graph.given(image), **given, **widgets)[0]
    return graph.keep(image=made)


@case(each=settings)
def the_shell_makes_the_same_image(host, setting):
    which, _, name = setting.partition(" ")
    method, denoise, widgets = SETTINGS[name]
    load(host, which)
    cfg = 1.0 if which == "fill" else 2.5
    image = random_image(1, 64, 64)
    amounts = {"right": 32, "bottom": 32}
    run = {"method": method, "seed": SEED, "steps": STEPS, "cfg": cfg, "denoise": denoise}
    ours = host.run(graph_of(host, which, image, **amounts, **run, **widgets)).kept["image"]

    tiny, outpaint = host.pack("models.tiny"), host.pack("models.outpaint")
    kinds = {"fill": ("flux_fill", "FluxFill"), "sd_inpaint": ("sd_inpaint", "SDInpaint")}
    module, cls = kinds[which]
    denoiser = getattr(host.pack(f"models.{module}"), cls).load(tiny.folder() / which, torch.float32, "cpu")
    sampling = host.pack("models.editing").Sampling(steps=STEPS, seed=SEED)
    paint = host.pack("models.repaint").Painter(denoiser, PROMPT, sampling, denoise, cfg=cfg)
    options = outpaint.Options(seed=SEED, **widgets)
    sides = {"left": 0, "right": 0, "top": 0, "bottom": 0} | amounts
    shell = outpaint.outpaint(paint, image, sides, method, options)
    assert_same_image(host, ours, shell)
    grown = 128 if method in ("mk2", "poor man") else 96
    assert tuple(ours.shape) == (1, grown, grown, 3)
    # known pixels are exact, but for where the method itself repaints the seam
    seam = {"mk2": 14, "poor man": 16, "mosaic": 9}.get(method, 0)
    known = (slice(None), slice(0, 64 - seam), slice(0, 64 - seam))
    assert torch.equal(ours[known].cpu(), image[known])


@case(each=lambda: ["direct", "mk2"])
def a_plain_model_paints_around_what_is_known(host, method):
    model, clip, vae = load(host, "kontext")
    image = random_image(2, 64, 64)
    run = {"method": method, "steps": 2, "cfg": 1.0, "denoise": 1.0, "left": 16, "mask_blur": 1, "window": 64}
    made = host.run(graph_of(host, "kontext", image, **run)).kept["image"]
    width = 128 if method == "mk2" else 80
    assert tuple(made.shape) == (2, 64, width, 3) and torch.isfinite(made).all()
    seam = 14 if method == "mk2" else 0
    assert torch.equal(made[:, :, width - 64 + seam :].cpu(), image[:, :, seam:])
    assert float((made[:, :, :8] - made[:, :, 8:16]).abs().mean()) > 0


@case(each=lambda: ["direct", "mk2"])
def the_shell_makes_the_same_image_with_a_plain_sd_model(host, method):
    """A random tiny UNet of four channels: the known latents are put back at every step."""
    from diffusers import UNet2DConditionModel

    load(host, "sd_inpaint")
    tiny, place = host.pack("models.tiny").folder() / "sd_inpaint", host.base.parent / "random_sd"
    if not place.is_dir():
        shutil.copytree(tiny, place, ignore=shutil.ignore_patterns("unet"))
        config = json.loads((tiny / "unet" / "config.json").read_text(encoding="utf-8"))
        torch.manual_seed(0)
        UNet2DConditionModel.from_config({**config, "in_channels": 4}).save_pretrained(place / "unet")
    with torch.inference_mode():
        model, clip, vae = host.pack("models.tiny.comfy").load(place)
    image, run = random_image(1, 64, 64), {"method": method, "steps": STEPS, "denoise": 0.8, "seed": SEED}
    graph = host.graph()
    positive, negative = (
        graph.add("CLIPTextEncode", clip=graph.given(clip), text=text)[0] for text in (PROMPT, "")
    )
    given = {"model": graph.given(model), "vae": graph.given(vae), "image": graph.given(image)}
    sizes = {"window": 64, "mask_blur": 1}
    made = graph.add(
        "DiptychOutpaint", positive=positive, negative=negative, cfg=2.5, right=32, **given, **run, **sizes
    )[0]
    ours = host.run(graph.keep(image=made)).kept["image"]
    outpaint, editing = host.pack("models.outpaint"), host.pack("models.editing")
    denoiser = host.pack("models.sd_blend").SDBlend.load(place, torch.float32, "cpu")
    sampling = editing.Sampling(steps=STEPS, seed=SEED)
    paint = host.pack("models.repaint").Painter(denoiser, PROMPT, sampling, 0.8, cfg=2.5)
    sides = {"left": 0, "right": 32, "top": 0, "bottom": 0}
    shell = outpaint.outpaint(paint, image, sides, method, outpaint.Options(seed=SEED, **sizes))
    assert_same_image(host, ours, shell)


@case
def what_cannot_be_outpainted_is_one_sentence(host):
    load(host, "fill")
    failed = host.run(graph_of(host, "fill", random_image(1, 64, 64)), may_fail=True)
    assert "nothing is to be painted, give a side more than 0" in failed.error


@case
def a_vae_of_another_model_is_refused_before_sampling(host):
    load(host, "fill")
    graph = host.graph()
    model, clip, *_ = graph.add("DiptychTinyModelLoader", which="fill")
    vae = graph.add("DiptychTinyModelLoader", which="sd_inpaint")[2]
    text = graph.add("CLIPTextEncode", clip=clip, text=PROMPT)[0]
    given = {"model": model, "positive": text, "negative": text, "vae": vae, "right": 16}
    made = graph.add("DiptychOutpaint", image=graph.given(random_image(1, 64, 64)), **given)[0]
    failed = host.run(graph.keep(image=made), may_fail=True)
    assert "vae makes latents of 4x8x10 where the model takes 16x8x10" in failed.error
