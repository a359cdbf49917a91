"""Tiled Sampler in ComfyUI: one window is plain sampling, several are what core does window by window."""

from __future__ import annotations

import torch

from . import SkipCase, case
from .sampling import Bench

WINDOW, STRIDE, STEPS = 8, 4, 3  # cells


class Recorder:
    """A model_function_wrapper that keeps what the model was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, apply_model, arguments):
        given = arguments["c"].get("c_concat")
        self.calls.append((arguments["input"].clone(), None if given is None else given.clone()))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])


@case(each=lambda: ["plain", "cfg", "noise_mask"])
def a_window_as_large_as_the_canvas_is_plain_sampling(host, setting):
    bench = Bench(host, **{"plain": {}, "cfg": {"cfg": 3.0}, "noise_mask": {"masked": True}}[setting])
    tiled = {"window": 128, "stride": 128, "order": "outward", "known": "keep", "blend": 0}
    bench.sample("ours", bench.graph.add("DiptychTiledSampler", sampler=bench.euler(), **tiled)[0])
    bench.sample("theirs", bench.euler())
    bench.graph.keep(source=bench.latent)
    got = bench.run()
    if setting == "noise_mask":
        torch.testing.assert_close(got["ours"][..., :8], got["source"][..., :8], rtol=0, atol=5e-6)
        torch.testing.assert_close(got["ours"], got["theirs"], rtol=0, atol=1e-5)
    else:
        assert torch.equal(got["ours"], got["theirs"])


@case(each=lambda: ["plain", "noise_mask"])
def a_plain_model_keeps_what_is_known_and_sees_no_more_than_a_window(host, setting):
    bench = Bench(host, width=32, masked=setting == "noise_mask")
    recorder = Recorder()
    tiled = {"window": 64, "stride": 32, "order": "outward", "known": "keep", "blend": 16}
    model = bench.host.nodes["TestRandomFlux"]().make(8, 32, 2, False)[0]
    model.set_model_unet_function_wrapper(recorder)
    conditioning = bench.graph.add("TestRandomFlux", height=8, width=32, batch=2, masked=False)[1]
    guider = bench.graph.add("BasicGuider", model=bench.graph.given(model), conditioning=conditioning)[0]
    bench.sample(
        "ours", bench.graph.add("DiptychTiledSampler", sampler=bench.euler(), **tiled)[0], guider=guider
    )
    bench.graph.keep(source=bench.latent)
    got = bench.run()
    assert {tuple(x.shape[-2:]) for x, _ in recorder.calls} == {(8, 8)}
    assert torch.isfinite(got["ours"]).all()
    windows = 4 if setting == "noise_mask" else 7
    assert len(recorder.calls) == windows * 6
    if setting == "noise_mask":
        torch.testing.assert_close(got["ours"][..., :16], got["source"][..., :16], rtol=0, atol=5e-6)


@case(each=lambda: ["fill", "sd_inpaint"])
def windows_are_core_sampling_with_everything_cut_by_hand(host, which):
    if not host.pack("models.tiny").card().get("trained"):
        raise SkipCase("the bundled tiny models are not trained yet")
    import comfy.sample
    import comfy.samplers

    nodes = host.nodes
    with torch.inference_mode():
        model, clip, vae = nodes["DiptychTinyModelLoader"]().load(which)
        image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
        canvas, mask, _ = nodes["DiptychOutpaintCanvas"]().expand(image, 0, 0, 64, 0, "px")
        (text,) = nodes["CLIPTextEncode"]().encode(clip, "a red circle")
        conditioner = {"fill": "DiptychFluxFillConditioner", "sd_inpaint": "DiptychSDInpaintConditioner"}[
            which
        ]
        positive, negative, latent = nodes[conditioner]().condition(text, text, vae, canvas, mask)[:3]
        sampling = model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
        euler = comfy.samplers.sampler_object("euler")
        noise = comfy.sample.prepare_noise(latent["samples"], 3)

        recorder, watched = Recorder(), model.clone()
        watched.set_model_unet_function_wrapper(recorder)
        (tiled,) = nodes["DiptychTiledSampler"]().build(euler, WINDOW * 8, STRIDE * 8, blend=0)
        steps = []
        ours = comfy.sample.sample_custom(
            watched,
            noise,
            1.0,
            tiled,
            sigmas,
            positive,
            negative,
            latent["samples"],
            callback=lambda step, x0, x, total: steps.append((step, total, tuple(x0.shape))),
            disable_pbar=True,
            seed=3,
        )

        values = positive[0][1]
        seen, told = values["concat_latent_image"].clone(), values["concat_mask"].clone()
        result, unknown = latent["samples"].clone(), mask[0, ::8, ::8] > 0
        plan = host.pack("samplers.tiles").plan(unknown, window=WINDOW, stride=STRIDE)
        size = told.shape[-1] // unknown.shape[-1]  # pixels of the mask in a cell
        for tile in plan:
            at = (slice(None), slice(None), tile.rows, tile.columns)
            pixels = tuple(slice(size * part.start, size * part.stop) for part in (tile.rows, tile.columns))
            cut = {
                "concat_latent_image": seen[at],
                "concat_mask": told.reshape(1, 1, *told.shape[-2:])[:, :, pixels[0], pixels[1]],
            }
            condition = [[positive[0][0], {**values, **cut}]]
            done = comfy.sample.sample_custom(
                model,
                noise[at],
                1.0,
                euler,
                sigmas,
                condition,
                condition,
                result[at],
                disable_pbar=True,
                seed=3,
            )
            hole = unknown[tile.rows, tile.columns].to(done.device)
            result[at] = torch.where(hole, done, result[at])
            seen[at] = torch.where(hole, done, seen[at])
            told.reshape(1, 1, *told.shape[-2:])[:, :, pixels[0], pixels[1]] = 0
            unknown[tile.rows, tile.columns] = False
    torch.testing.assert_close(ours, result, rtol=0, atol=host.within(2e-4))
    torch.testing.assert_close(ours[..., :8], latent["samples"][..., :8], rtol=0, atol=5e-6)
    assert {tuple(x.shape[-2:]) for x, _ in recorder.calls} == {(WINDOW, WINDOW)}
    assert [step for step, _, _ in steps] == list(range(len(plan) * STEPS))
    assert {total for _, total, _ in steps} == {len(plan) * STEPS} and steps[0][2] == tuple(noise.shape)


KINDS = {  # model's concat_keys, channels of c_concat, whether the hole is zeros, what becomes known
    "inpainting": (("mask", "masked_image"), 5, False, "image and mask"),
    "inverted": (("masked_image", "mask_inverted"), 5, False, "image and mask"),
    "Fill": ((), 4 + 64, False, "image and mask"),
    "glid": ((), 4, True, "image"),
    "control image": ((), 4, False, "nothing"),
}


@case(each=lambda: KINDS)
def each_kind_of_image_in_the_conditioning_is_cut_its_own_way(host, kind):
    from types import SimpleNamespace

    import comfy.conds

    keys, channels, zeros, becomes = KINDS[kind]
    cut, tiles = host.pack("samplers.comfy_cut"), host.pack("samplers.tiles")
    model = SimpleNamespace(concat_keys=keys)
    painted = torch.zeros(8, 12, dtype=torch.bool)
    painted[:, 6:8] = True
    data = torch.randn(1, channels, 8, 12, generator=torch.Generator().manual_seed(0))
    if zeros:
        data[:, :, :, 6:] = 0
    canvas, tile = torch.randn(1, 4, 8, 12), tiles.Tile(x=4, y=0, width=8, height=8, known=0)
    entry = {
        "model_conds": {
            "c_concat": comfy.conds.CONDNoiseShape(data),
            "c_crossattn": comfy.conds.CONDCrossAttn(torch.ones(1, 7, 3)),
            "ref_latents": comfy.conds.CONDList([canvas, canvas[..., :5]]),
        },
        "area": (8, 6, 0, 0),
        "mask": torch.arange(12.0).expand(1, 8, 12),
    }
    before = data.clone()
    made = cut.cut_entries([entry], tile, painted, canvas, model)[0]
    found, window = made["model_conds"]["c_concat"].cond, data[..., 4:]
    image = slice(1, 5) if kind == "inpainting" else slice(0, 4)
    inside = (slice(None), slice(None), slice(None), slice(2, 4))
    new = window.clone()
    if becomes != "nothing":
        new[:, image][inside] = canvas[..., 6:8]
    if becomes == "image and mask":
        mask = {"inpainting": slice(0, 1), "inverted": slice(4, 5), "Fill": slice(4, None)}[kind]
        new[:, mask][inside] = 1 if kind == "inverted" else 0
    assert torch.equal(found, new) and torch.equal(data, before)
    assert made["area"] == (8, 2, 0, 0) and made["mask"][0, 0].tolist() == list(range(4, 12))
    whole = made["model_conds"]["ref_latents"].cond
    assert torch.equal(whole[0], canvas[..., 4:]) and torch.equal(whole[1], canvas[..., :5])
    assert made["model_conds"]["c_crossattn"] is entry["model_conds"]["c_crossattn"]
    elsewhere = {**entry, "area": (8, 3, 0, 0)}
    assert len(cut.cut_entries([elsewhere, entry], tile, painted, canvas, model)) == 1
    assert "area" not in cut.cut_entries([elsewhere], tile, painted, canvas, model)[0]
    try:
        cut.entries_of({"positive": [{"control": object()}]})
    except ValueError as error:
        assert "a ControlNet, which Tiled Sampler cannot cut" in str(error)
    else:
        raise AssertionError("a ControlNet was taken")


@case
def the_shell_paints_the_same_windows(host):
    if not host.pack("models.tiny").card().get("trained"):
        raise SkipCase("the bundled tiny models are not trained yet")
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    graph = host.graph()
    model, clip, vae, *_ = graph.add("DiptychTinyModelLoader", which="fill")
    canvas, mask, *_ = graph.add("DiptychOutpaintCanvas", image=graph.given(image), right=64.0)
    filled = graph.add("DiptychFillHole", image=canvas, mask=mask, how="edge")[0]
    encoded = graph.add("CLIPTextEncode", clip=clip, text="a red circle")[0]
    guided = graph.add("FluxGuidance", conditioning=encoded, guidance=30.0)[0]
    positive, _, latent, *_ = graph.add(
        "DiptychFluxFillConditioner", positive=guided, negative=guided, vae=vae, image=filled, mask=mask
    )
    window = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)[0]
    sampler = graph.add("DiptychFlowMatchEulerSampler")[0]
    made = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=7)[0],
        guider=graph.add("BasicGuider", model=model, conditioning=positive)[0],
        sampler=graph.add("DiptychTiledSampler", sampler=sampler, window=64, stride=32, blend=16)[0],
        sigmas=graph.add("DiptychFlowMatchScheduler", latent=window, steps=STEPS)[0],
        latent_image=latent,
    )[0]
    graph.keep(image=graph.add("VAEDecode", samples=made, vae=vae)[0], canvas=filled, mask=mask)
    kept = host.run(graph).kept

    tiny, editing = host.pack("models.tiny"), host.pack("models.editing")
    fill = host.pack("models.flux_fill").FluxFill.load(tiny.folder() / "fill", torch.float32, "cpu")
    sampling = editing.Sampling(steps=STEPS, seed=7)
    options = {"window": 64, "stride": 32, "blend": 16, "sampling": sampling}
    shell = host.pack("models.tiled").paint(fill, kept["canvas"], kept["mask"], "a red circle", **options)
    torch.testing.assert_close(kept["image"].cpu().float(), shell, rtol=0, atol=host.within(1e-4))


@case
def what_cannot_be_cut_is_named_before_anything_is_sampled(host):
    bench = Bench(host)
    tiled = {"window": 512, "stride": 256, "order": "outward", "known": "keep", "blend": 0}
    bench.sample("ours", bench.graph.add("DiptychTiledSampler", sampler=bench.euler(), **tiled)[0])
    failed = host.run(bench.graph, may_fail=True)
    assert "window is 64 cells but the canvas is only 16x8" in failed.error
