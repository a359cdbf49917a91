"""The inspect nodes tell what ComfyUI's own tokenizers give and what its running models do."""

from __future__ import annotations

import torch

from . import case

LONG = "a red circle on green, " * 40
PROMPT = "make the red circle blue"


def kept(host, node, outputs, **inputs):
    graph = host.graph()
    given = {k: v if isinstance(v, (str, int, float, bool)) else graph.given(v) for k, v in inputs.items()}
    told = graph.add(node, **given)
    return host.run(graph.keep(**{name: told[slot] for slot, name in enumerate(outputs)})).kept


def tokens_of(host, text, clip=None):
    inputs = {} if clip is None else {"clip": clip}
    return kept(host, "DiptychTokenInspector", ("image", "report", "warning"), text=text, **inputs)


def load(host, which):
    with torch.inference_mode():
        return host.nodes["DiptychTinyModelLoader"]().load(which)


def sd15_clip():
    """A CLIP with Stable Diffusion 1's own tokenizer; its weights are not needed."""
    import comfy.sd
    import comfy.sd1_clip

    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer = comfy.sd1_clip.SD1Tokenizer()
    clip.patcher = type("Patcher", (), {"model_options": {}})()
    clip.tokenizer_options, clip.layer_idx, clip.use_clip_schedule = {}, None, False
    return clip


@case
def flux_tokens_are_those_of_the_published_tokenizers(host):
    found = tokens_of(host, PROMPT)
    lines = found["report"].splitlines()
    assert lines[0].startswith(
        "CLIP-L: 77 positions (trained with 77), 5 tokens of text, padding from position 7"
    )
    # ids of openai/clip-vit-large-patch14 and of t5-v1_1
    assert [line.split()[1] for line in lines[1:8]] == "49406 1078 518 736 7117 1746 49407".split()
    t5 = next(k for k, line in enumerate(lines) if line.startswith("T5"))
    assert [line.split()[1] for line in lines[t5 + 1 : t5 + 7]] == "143 8 1131 8196 1692 1".split()
    assert found["warning"] == "" and found["image"].shape[0] == 1


# A prompt and its ids, printed by transformers' tokenizers of FLUX.1-Kontext-dev.
SHOT = (
    "Transform the input photo of a person wearing clothes into a professional flat lay product shot.\n\n"
    "Extract only the clothing (top + pants set, or a single dress). Ignore body, background, shoes, "
    "jewelry, bags, and all other items.\n\nVirtually flatten the garment: remove perspective distortion, "
    "complete hidden parts, keep contours, prints, and design features accurate and symmetrical.\n\n"
    "Output a clean, commercial-grade image"
)
SHOT_CLIP = """49406 12288 518 16952 1125 539 320 2533 3309 7080 1095 320 4774 6313 6360 4306 2000 269 18962
1033 518 7425 263 1253 266 5003 1167 267 541 320 2688 2595 1818 12304 1774 267 5994 267 4079 267 6039 267
6136 267 537 615 1010 6207 269 22475 1082 32408 518 31418 281 9709 8996 43690 267 3263 7029 5149 267 1726
2036 1491 267 7704 267 537 1681 4643 8858 537 3645 40704 49407"""
SHOT_T5 = """4946 2032 8 3785 1202 13 3 9 568 5119 4954 139 3 9 771 2667 8260 556 2538 5 18742 163 8 5698 41
2916 1768 12792 356 6 42 3 9 712 3270 137 27 6715 60 643 6 2458 6 4439 6 8064 6 5621 6 11 66 119 1173 5
11143 120 2667 324 8 15885 10 2036 3503 26095 6 743 5697 1467 6 453 17643 7 6 11384 6 11 408 753 4034 11
3 23596 138 5 3387 2562 3 9 1349 6 1328 18 6801 1023"""


@case
def a_long_prompt_has_the_ids_that_kontext_was_seen_to_get(host):
    lines = tokens_of(host, SHOT.replace("(", "\\(").replace(")", "\\)"))["report"].splitlines()
    t5 = next(k for k, line in enumerate(lines) if line.startswith("T5"))
    assert [line.split()[1] for line in lines[1:78]] == SHOT_CLIP.split()
    assert [line.split()[1] for line in lines[t5 + 1 :]][: len(SHOT_T5.split())] == SHOT_T5.split()


@case
def flux_loses_what_lies_beyond_the_first_chunk_and_beyond_512(host):
    middle = tokens_of(host, "a red circle on green, " * 20)["warning"]
    assert "CLIP-L: the last" in middle and "pooled vector does not read" in middle and "T5" not in middle
    both = tokens_of(host, LONG * 3)["warning"]
    assert "CLIP-L" in both and "T5: the last" in both and "beyond the 512 positions" in both


@case
def stable_diffusion_reads_all_chunks(host):
    found = tokens_of(host, LONG, sd15_clip())
    assert found["report"].startswith("CLIP-L: 77 + 77 + 77 + 77 positions") and found["warning"] == ""


@case(each=lambda: ["fill", "kontext", "sd_inpaint"])
def the_bundled_encoders_get_what_the_report_says(host, which):
    _, clip, _ = load(host, which)
    for text in ("", PROMPT, "make the (red:1.5) circle blue", LONG):
        found = tokens_of(host, text, clip)
        tokens = clip.tokenize(text)
        ids = [[number for number, _ in chunks[0]] for chunks in tokens.values()]
        lines, told = found["report"].splitlines(), []
        for line in lines:
            if line.startswith(("CLIP-L", "T5")):
                told.append([])
            elif line.split()[1:2] == ["to"]:
                first, _, last, number, *_ = line.split()
                told[-1] += [int(number)] * (int(last) - int(first) + 1)
            elif line.startswith("  ") and line.split()[0].isdigit():
                number = line.split()[1]
                told[-1].append(int(number))
        assert told == ids, text
        assert bool(found["warning"]) == (text == LONG)
    assert "weight 1.5" in tokens_of(host, "(red:1.5)", clip)["report"]


# shapes


def flux_call(host, which):
    """(model, latent, conditioning) of an edit with the pack's own conditioners."""
    model, clip, vae = load(host, which)
    graph = host.graph()
    image, mask = torch.rand(1, 64, 128 if which == "fill" else 96, 3), torch.zeros(1, 64, 128)
    mask[:, :, 64:] = 1
    text = graph.add("CLIPTextEncode", clip=graph.given(clip), text=PROMPT)[0]
    if which == "fill":
        node = graph.add(
            "InpaintModelConditioning", positive=text, negative=text, vae=graph.given(vae),
            pixels=graph.given(image), mask=graph.given(mask), noise_mask=False,
        )  # fmt: skip
        found = host.run(graph.keep(conditioning=node[0], latent=node[2])).kept
        return model, found["latent"], found["conditioning"]
    conditioning = host.run(graph.keep(conditioning=text)).kept["conditioning"]
    with torch.inference_mode():
        references = [vae.encode(image), vae.encode(torch.rand(1, 32, 48, 3))]
    conditioning = [[conditioning[0][0], {**conditioning[0][1], "reference_latents": references}]]
    return model, {"samples": torch.zeros(2, 16, 8, 12)}, conditioning


def run_with_hooks(host, model, latent, conditioning, stages):
    """One Euler step with hooks: the shapes of the first output of every named module, and all ids."""
    network, seen, ids = model.model.diffusion_model, {}, []
    modules = dict(network.named_modules())
    handles = []

    def hook(name):
        def keep(module, inputs, output):
            outputs = output if isinstance(output, tuple) else (output,)
            seen.setdefault(name, [tuple(t.shape) for t in outputs if isinstance(t, torch.Tensor)])

        return keep

    for name in (name for stage in stages for name in stage.modules):
        handles.append(modules[name].register_forward_hook(hook(name)))
    if hasattr(network, "pe_embedder"):
        handles.append(network.pe_embedder.register_forward_hook(lambda m, given, out: ids.append(given[0])))
    graph = host.graph()
    positive = graph.given(conditioning)
    sampled = graph.add(
        "KSampler", model=graph.given(model), positive=positive, negative=positive,
        latent_image=graph.given(latent), steps=1, cfg=1.0, seed=0, sampler_name="euler", scheduler="simple",
    )  # fmt: skip
    host.run(graph.keep(sampled=sampled[0]))
    for handle in handles:
        handle.remove()
    return seen, ids


def assert_same_shapes(stages, seen):
    named = [(name, stage.shapes) for stage in stages for name in stage.modules]
    assert named and len(seen) == len(named)
    for name, shapes in named:
        assert sorted(seen[name]) == sorted(shapes), name


@case(each=lambda: ["fill", "kontext"])
def the_flux_walk_is_what_hooks_see(host, which):
    model, latent, conditioning = flux_call(host, which)
    walk = host.pack("models.inspect.comfy_shapes").walk(model, latent, conditioning)
    seen, ids = run_with_hooks(host, model, latent, conditioning, walk.stages)
    assert_same_shapes(walk.stages, seen)
    where = [stage for stage in walk.stages if stage.name.startswith("ids")]
    assert sum(stage.shapes[0][0] for stage in where) == ids[0].shape[1]
    at = 0
    for stage in where[1:]:
        at += where[where.index(stage) - 1].shapes[0][0]
        rows = ids[0][0, at : at + stage.shapes[0][0]]
        first, last = (tuple(int(v) for v in row) for row in (rows[0], rows[-1]))
        assert stage.note == f"{first} to {last}"
    report = kept(host, "DiptychShapeWalk", ("image", "report"), model=model, latent=latent,
                  conditioning=conditioning)["report"]  # fmt: skip
    assert report.startswith(f"FLUX {which.title()}: ") and "2 double + 3 single blocks" in report
    assert ("no known image" in report) is False
    if which == "kontext":
        assert "reference tokens: [2, 24, 64]  [2, 6, 64]" in report


@case
def the_sd_walk_is_what_hooks_see(host):
    model, clip, vae = load(host, "sd_inpaint")
    with torch.inference_mode():
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    latent = {"samples": torch.zeros(1, 4, 7, 10)}
    walk = host.pack("models.inspect.comfy_shapes").walk(model, latent, conditioning)
    seen, _ = run_with_hooks(host, model, latent, conditioning, walk.stages)
    for stage in walk.stages:
        for name in stage.modules:
            assert seen[name][0] == stage.shapes[0], name
    report = kept(host, "DiptychShapeWalk", ("image", "report"), model=model, latent=latent,
                  conditioning=conditioning)["report"]  # fmt: skip
    assert "9 channels in" in report and "4 noisy + 1 mask + 4 known; no known image" in report


@case
def the_walk_of_cores_own_unet_is_what_hooks_see(host):
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(
        image_size=32, in_channels=9, out_channels=4, model_channels=32, num_res_blocks=[2, 2, 2, 2],
        channel_mult=(1, 2, 4, 4), num_heads=8, use_spatial_transformer=True, context_dim=64,
        dtype=torch.float32, transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1] * 9 + [0] * 3,
        transformer_depth_middle=1, legacy=False, operations=comfy.ops.disable_weight_init,
    ).eval()  # fmt: skip
    told = host.pack("models.inspect.shapes")
    shapes = told.weights(dict(unet.named_parameters()))
    walk = host.pack("models.inspect.unet_shapes").walk(shapes, told.Call(1, 4, 22, 16, 77, 64))
    seen = {}
    modules = dict(unet.named_modules())
    # the UNet calls the layers inside its blocks one by one, so their last layer stands for the block
    for name in (name for stage in walk.stages for name in stage.modules):
        module = modules[name]
        last = module[-1] if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential) else module
        last.register_forward_hook(lambda m, given, out, name=name: seen.update({name: tuple(out.shape)}))
    with torch.no_grad():
        unet(torch.randn(1, 9, 22, 16), torch.tensor([5]), context=torch.randn(1, 77, 64))
    named = [(name, stage.shapes[0]) for stage in walk.stages for name in stage.modules]
    assert len(named) == 1 + 11 + 1 + 12 + 1
    for name, shape in named:
        assert seen[name] == shape, name
    sizes = [(22, 16), (11, 8), (6, 4), (3, 2)]  # odd sides round up
    assert [layer.queries for layer in walk.attention[::2]] == [h * w for h, w in sizes]
    assert sum(layer.layers for layer in walk.attention) == 2 * 16


@case
def what_does_not_fit_is_refused_in_a_sentence(host):
    model, clip, _ = load(host, "kontext")
    with torch.inference_mode():
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    latent = {"samples": torch.ones(1, 4, 8, 8)}
    walk = host.pack("models.inspect.comfy_shapes").walk
    for given, words in (
        ((model, latent, conditioning), "latent has shape"),
        ((model, {"samples": torch.zeros(1, 16, 8, 8)}, []), "conditioning is empty"),
        ((model, {"samples": torch.zeros(1, 16, 8, 8)}, [[torch.zeros(1, 4, 768), {}]]), "width 768"),
    ):
        try:
            walk(*given)
        except ValueError as error:
            assert words in str(error)
        else:
            raise AssertionError(words)
