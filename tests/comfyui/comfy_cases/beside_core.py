"""The pack beside core's own chain: equal on equal settings; where it differs on purpose, a case says how."""

from __future__ import annotations

import math

import torch

from . import case
from .two_hosts import PROMPT, SEED, fill_graph, noise, random_image, right_half, sample, text

CORE_SHIFT = math.exp(1.15)  # core's fixed shift of FLUX, as the pack's scheduler counts


def ksampler(graph, model, positive, negative, latent):
    settings = {
        "seed": SEED,
        "steps": 4,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    return graph.add(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, **settings
    )[0]


@case(each=lambda: ["with noise mask", "without noise mask"])
def the_fill_chain_equals_cores_on_equal_settings(host, noise_mask):
    masked = noise_mask == "with noise mask"
    graph = host.graph()
    loader = graph.add("DiptychTinyModelLoader", which="fill")
    positive = text(graph, loader[1], 30.0)
    image, mask = graph.given(random_image(1, 64, 128)), graph.given(right_half(1, 64, 128))
    core = graph.add(
        "InpaintModelConditioning",
        positive=positive,
        negative=positive,
        vae=loader[2],
        pixels=image,
        mask=mask,
        noise_mask=masked,
    )
    ours = graph.add(
        "DiptychFluxFillConditioner",
        positive=positive,
        negative=positive,
        vae=loader[2],
        image=image,
        mask=mask,
        noise_mask=masked,
    )
    theirs = ksampler(graph, loader[0], core[0], core[1], core[2])
    result = sample(graph, loader[0], ours[0], ours[2], shift_mode="fixed", shift=CORE_SHIFT)
    kept = host.run(graph.keep(core=theirs, ours=result)).kept
    assert (kept["core"]["samples"] - kept["ours"]["samples"]).abs().max() < host.within(1e-4)
    assert ("noise_mask" in kept["ours"]) == masked


@case
def the_kontext_chain_equals_cores_on_equal_settings(host):
    graph = host.graph()
    loader = graph.add("DiptychTinyModelLoader", which="kontext")
    positive = text(graph, loader[1], 2.5)
    first, second = graph.given(random_image(1, 64, 64)), graph.given(random_image(1, 32, 64))
    latents = [graph.add("VAEEncode", pixels=image, vae=loader[2])[0] for image in (first, second)]
    referenced = positive
    for latent in latents:
        referenced = graph.add("ReferenceLatent", conditioning=referenced, latent=latent)[0]
    theirs = ksampler(graph, loader[0], referenced, positive, latents[0])
    kontext = graph.add(
        "DiptychKontextConditioner",
        conditioning=positive,
        vae=loader[2],
        image=first,
        image_2=second,
        size_policy="keep",
    )
    result = sample(graph, loader[0], kontext[0], kontext[1], shift_mode="fixed", shift=CORE_SHIFT)
    kept = host.run(graph.keep(core=theirs, ours=result)).kept
    assert (kept["core"]["samples"] - kept["ours"]["samples"]).abs().max() < host.within(1e-4)


@case
def the_ode_rule_equals_core_euler_bit_for_bit(host):
    graph = host.graph()
    loader = graph.add("DiptychTinyModelLoader", which="kontext")
    kontext = graph.add(
        "DiptychKontextConditioner",
        conditioning=text(graph, loader[1], 2.5),
        vae=loader[2],
        image=graph.given(random_image(1, 64, 64)),
        size_policy="keep",
    )
    euler = graph.add("KSamplerSelect", sampler_name="euler")[0]
    ours = sample(graph, loader[0], kontext[0], kontext[1])
    theirs = sample(graph, loader[0], kontext[0], kontext[1], sampler=euler)
    kept = host.run(graph.keep(ours=ours, core=theirs)).kept
    assert torch.equal(kept["ours"]["samples"], kept["core"]["samples"])


@case
def starting_noise_is_one_generator_on_spatial_latents(host):
    import comfy.sample

    drawn = comfy.sample.prepare_noise(torch.zeros(1, 16, 8, 16), SEED)
    assert torch.equal(drawn, noise(1, 64, 128))


def condition_both(host, image, mask):
    """(core's, ours) kept values of the two Fill conditioners on one image and mask"""
    graph = host.graph()
    loader = graph.add("DiptychTinyModelLoader", which="fill")
    positive = text(graph, loader[1], 30.0, PROMPT)
    image, mask = graph.given(image), graph.given(mask)
    shared = {"positive": positive, "negative": positive, "vae": loader[2], "mask": mask}
    core = graph.add("InpaintModelConditioning", pixels=image, noise_mask=True, **shared)
    ours = graph.add("DiptychFluxFillConditioner", image=image, noise_mask=True, **shared)
    kept = host.run(graph.keep(core=core[0], core_latent=core[2], ours=ours[0], ours_latent=ours[2])).kept
    return (kept["core"][0][1], kept["core_latent"]), (kept["ours"][0][1], kept["ours_latent"])


@case
def it_differs_by_making_sides_multiples_of_16(host):
    image = torch.rand(1, 72, 136, 3, generator=torch.Generator().manual_seed(0))
    (_, core), (values, ours) = condition_both(host, image, torch.ones(1, 72, 136))
    assert core["samples"].shape[-2:] == (9, 17)  # odd: the model pads them with a copy of the other edge
    assert all(side % 2 == 0 for side in ours["samples"].shape[-2:])
    assert values["concat_latent_image"].shape == ours["samples"].shape


@case
def it_differs_by_one_mask_rule_for_pixels_and_channels(host):
    ramp = torch.linspace(0, 1, 129)[:-1].expand(1, 64, 128)
    assert (ramp == 0.5).any()
    (core, _), (ours, _) = condition_both(host, random_image(1, 64, 128), ramp)
    assert len(core["concat_mask"].unique()) > 100  # soft for the model, though its pixels were cut hard
    assert ours["concat_mask"].unique().tolist() == [0.0, 1.0]
    assert torch.equal(ours["concat_mask"].reshape(ramp.shape), (ramp >= 0.5).float())


@case
def it_differs_by_broadcasting_batches_where_core_fails(host):
    graph, decoded = fill_graph(host, random_image(3, 64, 64), right_half(2, 64, 64))
    assert host.run(graph.keep(image=decoded)).kept["image"].shape == (3, 64, 64, 3)
    graph, decoded = fill_graph(host, random_image(1, 64, 64), right_half(2, 64, 64))
    assert host.run(graph.keep(image=decoded)).kept["image"].shape == (2, 64, 64, 3)


@case
def it_differs_by_counting_the_real_tokens(host):
    graph = host.graph()
    loader = graph.add("DiptychTinyModelLoader", which="fill")
    latent = graph.given({"samples": torch.zeros(1, 16, 8, 16)})
    ours = graph.add("DiptychFlowMatchScheduler", latent=latent, steps=4)
    core = graph.add("BasicScheduler", model=loader[0], scheduler="simple", steps=4, denoise=1.0)
    sized = graph.add(
        "ModelSamplingFlux", model=loader[0], max_shift=1.15, base_shift=0.5, width=128, height=64
    )
    informed = graph.add("BasicScheduler", model=sized[0], scheduler="simple", steps=4, denoise=1.0)
    kept = host.run(graph.keep(ours=ours[0], core=core[0], informed=informed[0])).kept
    assert (kept["ours"] - kept["core"]).abs().max() > 0.1
    torch.testing.assert_close(kept["ours"], kept["informed"], atol=1e-4, rtol=0)
