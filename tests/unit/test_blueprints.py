"""The blueprints in subgraphs/ and the templates that open as apps: sound graphs that say what they do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfyui_diptych import NODE_CLASS_MAPPINGS

ROOT = Path(__file__).parents[2]
BLUEPRINTS = {path.stem: path for path in (ROOT / "subgraphs").glob("*.json")}
APPS = {path.stem: path for path in (ROOT / "example_workflows").glob("*.app.json")}
WANTED = {
    "ICEdit - edit by instruction",
    "Kontext edit",
    "Fill a mask",
    "Outpaint an image",
    "Best of N edit",
}
NOTES = ("Note", "MarkdownNote")
ENDS = {-10: "inputs", -20: "outputs"}
# Core's nodes that they use: all are in the oldest ComfyUI that the pack runs in.
CORE = set(
    "CLIPTextEncode FluxGuidance RandomNoise BasicGuider SamplerCustomAdvanced VAEDecode SaveImage LoadImage "
    "ImageStitch ImageScaleBy".split()
)
# What an app for the tiny models has otherwise than its blueprint.
TINY = {
    "DiptychEditModelLoader": ("unet_name", "clip_name1", "clip_name2", "vae_name"),
    "DiptychGRPOLoraLoader": ("lora",),
    "DiptychBuilder": ("panel_width",),
    "DiptychKontextConditioner": ("size_policy",),
    "DiptychOutpaint": ("left", "top", "right", "bottom"),
}

each = pytest.mark.parametrize("name", sorted(BLUEPRINTS))
each_app = pytest.mark.parametrize("name", sorted(APPS))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def inside(workflow: dict) -> dict:
    (subgraph,) = workflow["definitions"]["subgraphs"]
    return subgraph


def outside(workflow: dict) -> dict:
    """The node that stands for the subgraph."""
    (node,) = [node for node in workflow["nodes"] if node["type"] == inside(workflow)["id"]]
    return node


def test_the_tasks_have_one_and_every_name_is_a_file_name_on_every_system():
    assert set(BLUEPRINTS) == WANTED
    titles = {cls.DISPLAY_NAME for cls in NODE_CLASS_MAPPINGS.values()}
    for name in BLUEPRINTS:
        assert not set(name) & set('<>:"/\\|?*') and name not in titles  # the search would show two of a name


@each
def test_it_is_one_node_that_says_what_it_does_and_is_found_by_other_words(name):
    workflow = read(BLUEPRINTS[name])
    assert [node["type"] for node in workflow["nodes"]] == [inside(workflow)["id"]]
    assert inside(workflow)["name"] == outside(workflow)["title"] == name
    assert inside(workflow)["category"] == "ComfyUI-Diptych"
    description, extra = inside(workflow)["description"], workflow["extra"]
    assert description.endswith(".") and 60 < len(description) < 240
    assert extra["BlueprintDescription"] == description
    aliases = extra["BlueprintSearchAliases"]
    assert len(set(aliases)) >= 5 and all(word == word.lower() for word in aliases)


@each
def test_it_has_the_widgets_that_matter_and_sockets_for_models(name):
    inputs = outside(read(BLUEPRINTS[name]))["inputs"]
    widgets = [socket["name"] for socket in inputs if "widget" in socket]
    sockets = {socket["name"]: socket["type"] for socket in inputs if "widget" not in socket}
    assert sockets.pop("image") == "IMAGE"
    assert sockets.pop("mask", "MASK") == "MASK"
    assert sockets == {"model": "MODEL", "clip": "CLIP", "vae": "VAE"}
    assert widgets[0] in ("instruction", "prompt") and {"seed", "unet_name"} < set(widgets)
    assert len(widgets) <= (7 if name.startswith("Outpaint") else 6)
    assert len(outside(read(BLUEPRINTS[name]))["widgets_values"]) == len(widgets)


@each
def test_its_note_names_every_file_and_the_page_can_offer_it(name):
    graph = inside(read(BLUEPRINTS[name]))
    note = "".join(node["widgets_values"][0] for node in graph["nodes"] if node["type"] in NOTES)
    asked = 0
    for node in graph["nodes"]:
        values = [v for v in node["widgets_values"] if isinstance(v, str) and v.endswith(".safetensors")]
        models = node["properties"].get("models", [])
        assert sorted(values) == sorted(model["name"] for model in models)
        for model in models:
            owner, repository = model["url"].removeprefix("https://huggingface.co/").split("/")[:2]
            assert f"`{model['name']}`" in note and f"`{model['directory']}`" in note
            assert f"huggingface.co/{owner}/{repository})" in note
            asked += 1
    assert asked >= 4 and "tiny" in note  # how to try it without any


def all_workflows() -> dict[str, dict]:
    return {path.name: read(path) for path in (*BLUEPRINTS.values(), *APPS.values())}


@pytest.mark.parametrize("file", [path.name for path in (*BLUEPRINTS.values(), *APPS.values())])
def test_every_node_is_known_and_every_link_has_two_ends_that_know_it(file):
    workflow = all_workflows()[file]
    graph = inside(workflow)
    ids = [node["id"] for node in (*workflow["nodes"], *graph["nodes"])]
    assert len(ids) == len(set(ids))  # one space of numbers, or the page renames them
    for node in (*workflow["nodes"], *graph["nodes"]):
        known = (*NODE_CLASS_MAPPINGS, *CORE, *NOTES, graph["id"])
        assert node["type"] in known and node.get("mode", 0) == 0
    check_links(graph, graph["links"])
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    check_links(workflow, [dict(zip(names, link, strict=True)) for link in workflow["links"]])
    for mine, its in (("inputs", "inputs"), ("outputs", "outputs")):
        outer = [(socket["name"], socket["type"]) for socket in outside(workflow)[mine]]
        assert outer == [(socket["name"], socket["type"]) for socket in graph[its]]


def check_links(graph: dict, links: list[dict]) -> None:
    nodes = {node["id"]: node for node in graph["nodes"]}
    seen = set()
    for link in links:
        origin, target = link["origin_id"], link["target_id"]
        source = graph["inputs"] if origin in ENDS else nodes[origin]["outputs"]
        sink = graph["outputs"] if target in ENDS else nodes[target]["inputs"]
        out, into = source[link["origin_slot"]], sink[link["target_slot"]]
        assert link["id"] in (out["linkIds"] if origin in ENDS else out["links"])
        assert into["linkIds"] == [link["id"]] if target in ENDS else into["link"] == link["id"]
        assert out["type"] == into["type"] == link["type"], link
        seen.add(link["id"])
    used = {socket["link"] for node in nodes.values() for socket in node.get("inputs", [])} - {None}
    assert used <= seen and len(seen) == len(links)


@pytest.mark.parametrize("file", [path.name for path in (*BLUEPRINTS.values(), *APPS.values())])
def test_every_node_of_ours_has_the_inputs_and_values_that_its_class_has_now(file):
    for node in inside(all_workflows()[file])["nodes"]:
        if node["type"] in NODE_CLASS_MAPPINGS:
            table = NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
            rows = {**table.get("required", {}), **table.get("optional", {})}
            assert [socket["name"] for socket in node["inputs"]] == list(rows)
            assert len([v for v in node["widgets_values"] if v not in ("fixed", "randomize")]) == len(
                [socket for socket in node["inputs"] if "widget" in socket]
            )
            outputs = tuple(output["type"] for output in node["outputs"])
            assert outputs == NODE_CLASS_MAPPINGS[node["type"]].RETURN_TYPES


@each_app
def test_an_app_shows_widgets_that_are_there_and_an_image(name):
    workflow = read(APPS[name])
    nodes = {node["id"]: node for node in workflow["nodes"]}
    extra = workflow["extra"]
    assert extra["linearMode"] is True
    for number, widget, config in extra["linearData"]["inputs"]:
        assert widget in [s["name"] for s in nodes[number]["inputs"] if "widget" in s and s["link"] is None]
        assert len(config.get("description", "")) <= 28  # more does not fit beside the image
    assert [nodes[number]["type"] for number in extra["linearData"]["outputs"]] == ["SaveImage"]


@each_app
def test_an_app_holds_the_blueprint_of_its_task(name):
    """Node for node and link for link; one for the tiny models names other files and sizes."""
    graph = inside(read(APPS[name]))
    blueprint = inside(read(BLUEPRINTS[graph["name"]]))
    assert graph["links"] == blueprint["links"] and graph["groups"] == blueprint["groups"]
    for mine, its in zip(graph["nodes"], blueprint["nodes"], strict=True):
        differs = TINY.get(mine["type"], ())
        widgets = [socket["name"] for socket in mine["inputs"] if "widget" in socket]
        values = [[v for v in n["widgets_values"] if v not in ("fixed", "randomize")] for n in (mine, its)]
        assert {**mine, "widgets_values": 0, "properties": 0} == {**its, "widgets_values": 0, "properties": 0}
        if not widgets:
            assert values[0] == values[1]
        for widget, one, other in zip(widgets, *values, strict=False):
            assert one == other or widget in differs, f"{mine['type']} {widget}"


def test_three_apps_run_without_any_file():
    tiny = [
        name
        for name in APPS
        if any("tiny " in str(value) for value in outside(read(APPS[name]))["widgets_values"])
    ]
    assert len(tiny) == 3
