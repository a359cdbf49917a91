"""What nodes show on themselves: the slider's images, masks for the viewer, reports, words for numbers."""

from __future__ import annotations

import torch

from . import case


def shown(host, run) -> list[dict]:
    """What the run's nodes returned as `ui`, the test's own left out."""
    return [output for output in run.outputs.values() if output]


def images(host, entries: list[dict]) -> list[torch.Tensor]:
    """The pictures [H,W,3] in 0..1 that `ui` names, read from ComfyUI's temp folder."""
    from pathlib import Path

    import folder_paths
    import numpy
    from PIL import Image

    folder = Path(folder_paths.get_temp_directory())
    assert all(entry["type"] == "temp" for entry in entries)
    opened = [Image.open(folder / entry["filename"]).convert("RGB") for entry in entries]
    return [torch.from_numpy(numpy.asarray(one) / 255).float() for one in opened]


@case
def before_and_after_gives_core_its_two_batches_or_one_image(host):
    before, after = torch.rand(1, 16, 24, 3), torch.rand(2, 16, 24, 3)
    graph = host.graph()
    node = graph.add("DiptychCompare", before=graph.given(before), after=graph.given(after))
    run = host.run(graph.keep(both=node[0]))
    [ui] = shown(host, run)
    slider = "ImageCompare" in host.nodes
    assert ("compare_view" in host.nodes["DiptychCompare"].INPUT_TYPES().get("optional", {})) == slider
    if not slider:
        assert set(ui) == {"images"} and len(ui["images"]) == 2
    else:
        compared = host.graph()
        core = {"image_a": compared.given(before), "image_b": compared.given(after), "compare_view": {}}
        compared.add("ImageCompare", **core)
        [cores] = shown(host, host.run(compared))
        assert set(ui) == {name for name in cores if name.endswith("_images")}
        for name in ui:
            assert len(ui[name]) == len(cores[name])
            ours, theirs = images(host, ui[name]), images(host, cores[name])
            assert all((a - b).abs().max() <= 1 / 255 + 1e-6 for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(run.kept["both"][1, :, -24:], after[1])


@case
def a_loader_shows_its_report(host):
    graph = host.graph()
    model = graph.add("DiptychTinyModelLoader", which="fill")
    lora = "diptych tiny demo/icedit.safetensors"
    loader = graph.add("DiptychGRPOLoraLoader", model=model[0], lora=lora)
    run = host.run(graph.keep(report=loader[1]))
    assert [ui["text"] for ui in shown(host, run)] == [[run.kept["report"]]]


@case
def a_mask_packer_shows_the_mask_that_it_packed(host):
    mask = torch.rand(2, 32, 48).round()
    graph = host.graph()
    packer = graph.add("DiptychMaskPacker", mask=graph.given(mask))
    run = host.run(graph.keep(mask=packer[1]))
    [ui] = shown(host, run)
    for one, seen in zip(images(host, ui["diptych_masks"]), run.kept["mask"], strict=True):
        assert torch.equal(one[..., 0], seen)


@case
def numbers_words_and_links_mean_the_same(host):
    """A workflow saved while eta was a number, one that says auto, and a number that comes by a link."""
    results = []
    for eta in (-1.0, "auto", "0.7", 0.7):
        graph = host.graph()
        given = graph.given(eta) if eta == 0.7 else eta
        sampler = graph.add("DiptychFlowMatchEulerSampler", rule="flow", eta=given)
        results.append(host.run(graph.keep(sampler=sampler[0])).kept["sampler"])
    told = [sampler.extra_options | vars(sampler) for sampler in results]
    options = [{k: v for k, v in one.items() if not callable(v)} for one in told]
    assert options[0] == options[1] and options[2] == options[3] and len(options[0])


@case
def a_word_that_is_no_number_is_refused_in_one_sentence(host):
    graph = host.graph()
    sampler = graph.add("DiptychFlowMatchEulerSampler", rule="flow", eta="much")
    run = host.run(graph.keep(sampler=sampler[0]), may_fail=True)
    assert "eta is 'much', a str: give a number from -1.0 to 2.0, or auto." in run.error
