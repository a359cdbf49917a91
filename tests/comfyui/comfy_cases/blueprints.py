"""Every blueprint, run as the page would run it, makes the image that the flat template of its task makes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch

from . import ROOT, case
from .workflows import convert

BLUEPRINTS = {path.stem: path for path in (ROOT / "subgraphs").glob("*.json")}
TINY = {"unet_name": "tiny fill (bundled)"}
KONTEXT = {"unet_name": "tiny kontext (bundled)", "size_policy": "keep"}
LORA = {"lora": "diptych tiny demo/icedit.safetensors"}
# What a user chooses to run it on the tiny models, and the template that does the same node by node.
FLAT = {
    "ICEdit - edit by instruction": ("Edit by instruction - tiny", {**TINY, **LORA, "panel_width": 0}),
    "Kontext edit": ("Edit with Kontext - tiny", KONTEXT),
    "Fill a mask": ("Repair a detail - tiny", {**TINY, "size": 64}),
    "Outpaint an image": ("Outpaint in one node - tiny", TINY),
    "Best of N edit": ("Best of six - tiny", {**KONTEXT, "judge": "shapes"}),
}
OTHER_NAMES = {"seed": "noise_seed", "judge": "name"}  # inputs of a blueprint called otherwise inside
DEMO = 99
FROM_DEMO = {"image": 0, "instruction": 1, "mask": 2, "prompt": 4}


def placed(name: str, demo: dict, chosen: dict[str, Any], image: int = 0) -> dict:
    """A workflow of Demo Image and the blueprint's node, `chosen` in its widgets.

    image: which output of Demo Image is the image.
    """
    workflow = json.loads(BLUEPRINTS[name].read_text(encoding="utf-8"))
    node = workflow["nodes"][0]
    names = [socket["name"] for socket in node["inputs"] if "widget" in socket]
    for key, value in chosen.items():
        node["widgets_values"][names.index(key)] = value
    for slot, socket in enumerate(node["inputs"]):
        if socket["name"] in FROM_DEMO:
            socket["link"] = slot + 1
            origin = {**FROM_DEMO, "image": image}[socket["name"]]
            workflow["links"].append([slot + 1, DEMO, origin, node["id"], slot, socket["type"]])
    source = {"id": DEMO, "type": "DiptychDemoImage", "widgets_values": demo, "inputs": []}
    workflow["nodes"].append(source)
    return workflow


def constants(prompt: dict, class_type: str) -> dict[str, Any]:
    """The unlinked values of the node of a class; of several, those of the first."""
    node = next((node for node in prompt.values() if node["class_type"] == class_type), {"inputs": {}})
    return {key: value for key, value in node["inputs"].items() if not isinstance(value, list)}


def result(prompt: dict) -> list:
    """Where the finished image comes out; of several, the one of the Early Filter Sampler."""
    ends = [k for k, n in prompt.items() if n["class_type"] in ("DiptychSplit", "DiptychPasteBack")]
    ends = ends or [k for k, n in prompt.items() if n["class_type"] == "DiptychOutpaint"]

    def judged(key: str) -> bool:
        sampled = prompt[prompt[prompt[key]["inputs"]["image"][0]]["inputs"]["samples"][0]]
        return prompt[sampled["inputs"]["sampler"][0]]["class_type"] == "DiptychEarlyFilterSampler"

    return [next(filter(judged, ends)) if len(ends) > 1 else ends[0], 0]


def as_api(host, workflow: dict) -> dict:
    import workflow as convert_module

    return convert_module.to_api(workflow, {c: d.INPUT_TYPES() for c, d in host.nodes.items()})


@case(each=lambda: FLAT)
def on_the_tiny_models_it_gives_the_flat_templates_image(host, name):
    template, chosen = FLAT[name]
    flat = convert(host, template)
    used = {node["class_type"] for node in flat.values()}
    chosen = dict(chosen)
    demo = next(key for key, node in flat.items() if node["class_type"] == "DiptychDemoImage")
    shown = [node["inputs"].get("image", [None]) for node in flat.values()]
    image = next(link[1] for link in shown if link[0] == demo)
    blueprint = json.loads(BLUEPRINTS[name].read_text(encoding="utf-8"))
    for inside in blueprint["definitions"]["subgraphs"][0]["inputs"]:  # as the template has it
        key = OTHER_NAMES.get(inside["name"], inside["name"])
        for class_type in used - {"DiptychTinyModelLoader", "DiptychDemoImage", "CLIPTextEncode"}:
            value = constants(flat, class_type).get(key)
            if value is not None and inside["name"] not in (*chosen, *FROM_DEMO):
                chosen[inside["name"]] = value
    prompt = as_api(host, placed(name, constants(flat, "DiptychDemoImage"), chosen, image))
    inside = [node["inputs"] for key, node in prompt.items() if ":" in key]
    for key, value in chosen.items():
        arrived = [
            inputs[OTHER_NAMES.get(key, key)] for inputs in inside if OTHER_NAMES.get(key, key) in inputs
        ]
        assert value in arrived, f"{key} does not arrive"
    for node in prompt.values():  # what stays inside: steps, guidance, size of the schedule
        if node["class_type"] in used:
            node["inputs"].update(constants(flat, node["class_type"]))
    made = [host.run({**p, "keep": keep(result(p))}).kept["image"] for p in (flat, prompt)]
    assert made[0].std() > 0.05 and torch.equal(*made), float((made[0] - made[1]).abs().max())


def keep(value: list) -> dict:
    return {"class_type": "TestKeepValue", "inputs": {"value": value, "name": "image"}}


@case(each=lambda: FLAT)
def as_it_lies_on_the_canvas_it_asks_for_its_files(host, name):
    """In a ComfyUI without a model: one sentence says which file belongs where, before anything is made."""
    prompt = as_api(host, placed(name, {"example": 0}, {}))
    for folder in ("diffusion_models", "text_encoders", "vae"):
        for file in (host.base / "models" / folder).glob("*.safetensors"):
            file.unlink()
    (host.base / "models/loras/icedit_lora.safetensors").unlink(missing_ok=True)
    clear_lists()
    prompt["keep"] = keep(result(prompt))
    valid, _, _, errors = host.validate(prompt)
    wrong = {prompt[key]["class_type"] for key in errors}
    assert wrong == ({"DiptychGRPOLoraLoader"} if "lora" in json.dumps(prompt) else set())
    for node in prompt.values():
        if "lora" in node["inputs"]:
            node["inputs"]["lora"] = LORA["lora"]
    file = next(n for n in prompt.values() if n["class_type"] == "DiptychEditModelLoader")["inputs"][
        "unet_name"
    ]
    error = host.run(prompt, may_fail=True).error
    assert f"unet_name is '{file}', which is not in models/diffusion_models: put it there" in error


def clear_lists() -> None:
    import folder_paths

    folder_paths.filename_list_cache.clear()


@case
def what_is_connected_needs_no_file(host):
    graph = host.graph()
    model, clip, vae, *_ = graph.add("DiptychTinyModelLoader", which="kontext")
    names = dict.fromkeys(("unet_name", "clip_name1", "clip_name2", "vae_name"), "not there.safetensors")
    loaded = graph.add("DiptychEditModelLoader", **names, model=model, clip=clip, vae=vae)
    graph.keep(model=loaded[0], clip=loaded[1], vae=loaded[2], given=model, given_clip=clip, given_vae=vae)
    kept = host.run(graph).kept
    assert kept["model"] is kept["given"]
    assert kept["clip"] is kept["given_clip"] and kept["vae"] is kept["given_vae"]
    graph.prompt[loaded[0][0]]["inputs"]["vae"] = model
    _, _, _, errors = host.validate(graph.prompt)
    assert "return_type_mismatch" in json.dumps(errors)


@case
def a_connected_vae_goes_with_the_tiny_model_of_the_menu(host):
    graph = host.graph()
    other = graph.add("DiptychTinyModelLoader", which="kontext")
    names = dict.fromkeys(("clip_name1", "clip_name2", "vae_name"), "auto")
    loaded = graph.add("DiptychEditModelLoader", unet_name="tiny fill (bundled)", **names, vae=other[2])
    kept = host.run(graph.keep(model=loaded[0], vae=loaded[2], given=other[2])).kept
    assert kept["vae"] is kept["given"]
    assert type(kept["model"].model.model_config).__name__ == "FluxInpaint"


@case
def files_go_through_cores_own_loaders(host):
    """Which loader is asked for which file; auto takes the published names, the highest precision first."""
    asked: dict[str, dict] = {}
    loaders = {"UNETLoader": "load_unet", "DualCLIPLoader": "load_clip", "VAELoader": "load_vae"}
    own = {node: host.nodes[node] for node in loaders}
    for node, function in loaders.items():
        real = getattr(own[node], function)

        def load(self, *, _node=node, _real=real, **inputs):
            inspect.signature(_real).bind(self, **inputs)  # as this ComfyUI's loader can be called
            asked[_node] = inputs
            return (_node,)

        host.nodes[node] = type(node, (own[node],), {function: load})
    files = {
        "diffusion_models": ["flux1-fill-dev.safetensors"],
        "text_encoders": [
            "t5xxl_fp8_e4m3fn.safetensors",
            "flux/clip_l.safetensors",
            "t5xxl_fp16.safetensors",
        ],
        "vae": ["other.safetensors", "ae.safetensors"],
    }
    made = [host.base / "models" / folder / file for folder, names in files.items() for file in names]
    try:
        for path in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        clear_lists()
        graph = host.graph()
        names = dict.fromkeys(("clip_name1", "clip_name2", "vae_name"), "auto")
        loaded = graph.add("DiptychEditModelLoader", unet_name="flux1-fill-dev.safetensors", **names)
        kept = host.run(graph.keep(model=loaded[0], clip=loaded[1], vae=loaded[2])).kept
        assert kept == {"model": "UNETLoader", "clip": "DualCLIPLoader", "vae": "VAELoader"}
        assert asked["UNETLoader"] == {"unet_name": "flux1-fill-dev.safetensors", "weight_dtype": "default"}
        clips = asked["DualCLIPLoader"]
        assert clips["type"] == "flux" and Path(clips["clip_name1"]).name == "clip_l.safetensors"
        assert clips["clip_name2"] == "t5xxl_fp16.safetensors"
        assert asked["VAELoader"] == {"vae_name": "ae.safetensors"}
        made[-1].unlink()
        clear_lists()
        host.executor = None  # what was loaded is not loaded again
        error = host.run(graph, may_fail=True).error
    finally:
        host.nodes.update(own)
        for path in made:
            path.unlink(missing_ok=True)
        clear_lists()
    assert "vae_name is auto, but models/vae holds no file called ae: put ae.safetensors" in error
