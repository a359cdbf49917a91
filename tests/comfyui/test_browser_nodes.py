"""In a real browser: what the pack's own JavaScript shows on nodes, in both renderers."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych import NODE_CLASS_MAPPINGS
from comfyui_diptych.models.packing import pack_mask
from comfyui_diptych.nodes.guard import checked
from comfyui_diptych.training.choices import PRESETS
from comfyui_diptych.training.recipes import read
from PIL import Image
from test_browser import browser, has_nodes_2, page  # noqa: F401  (fixtures)

RENDERERS = ["canvas", "nodes 2.0"]


def graph(*nodes: dict, links: list[list] = ()) -> dict:
    """A workflow as the page saves it: nodes {id, type, widgets_values, ...} side by side."""
    placed = [{"pos": [500 * number, 60], "flags": {}, "mode": 0, **n} for number, n in enumerate(nodes)]
    return {
        "nodes": placed,
        "links": links,
        "last_node_id": max(node["id"] for node in nodes),
        "last_link_id": len(links),
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


@pytest.fixture(params=RENDERERS)
def vue(request, comfyui):
    """Whether the page shall draw nodes as elements; skips where it cannot."""
    if request.param != "canvas" and not has_nodes_2(comfyui):
        pytest.skip("its page has no Nodes 2.0")
    return request.param != "canvas"


def image(number: int, colour: int, link: int) -> dict:
    outputs = [{"name": "IMAGE", "type": "IMAGE", "links": [link]}]
    return {"id": number, "type": "EmptyImage", "size": [300, 150], "outputs": outputs} | {
        "widgets_values": [64, 64, 1, colour]
    }


def test_a_slider_shows_before_and_after(page, vue, comfyui):  # noqa: F811
    if not has_nodes_2(comfyui):
        pytest.skip("its core has no IMAGECOMPARE widget: the node shows one image")
    inputs = [{"name": n, "type": "IMAGE", "link": k + 1} for k, n in enumerate(("before", "after"))]
    compare = {"id": 3, "type": "DiptychCompare", "size": [400, 400], "inputs": inputs}
    workflow = graph(
        image(1, 0xC80000, 1),
        image(2, 0x0000C8, 2),
        compare,
        links=[[1, 1, 0, 3, 0, "IMAGE"], [2, 2, 0, 3, 1, "IMAGE"]],
    )
    seen = page(do="compare", workflow=workflow, vue=vue, screenshot=None)
    assert seen["outcome"] == "success" and set(seen["inputs"]) == {"before", "after"}
    assert [len(seen["value"][side]) for side in ("beforeImages", "afterImages")] == [1, 1]
    if vue:
        assert seen["count"] == 2
        assert [round(float(cut.split()[1].rstrip("%"))) for cut in seen["cuts"]] == [75, 25]
    else:  # left of the line is before
        assert seen["pixels"] == [[0, 0, 200], [200, 0, 0]]
    assert [problem for problem in seen["problems"] if "iptych" in problem] == []


def test_a_report_stands_in_the_node(page, vue, comfyui, server):  # noqa: F811
    """The text that the node returned, as the server's history has it; the workflow does not save it."""
    inputs = [{"name": n, "type": "IMAGE", "link": k + 1} for k, n in enumerate(("edited", "source"))]
    outputs = [{"name": n, "type": "FLOAT"} for n in ("kept", "changed", "similarity", "success")] + [
        {"name": "report", "type": "STRING"},
        {"name": "annotated", "type": "IMAGE"},
    ]
    score = {"id": 3, "type": "DiptychEditScore", "size": [400, 400], "inputs": inputs, "outputs": outputs}
    workflow = graph(
        image(1, 0x101010 * (1 + vue), 1),  # another image for each renderer: nothing comes from a cache
        image(2, 0x0000C8, 2),
        {**score, "widgets_values": ["make it blue"]},
        links=[[1, 1, 0, 3, 0, "IMAGE"], [2, 2, 0, 3, 1, "IMAGE"]],
    )
    seen = page(do="report", workflow=workflow, vue=vue, type="DiptychEditScore", screenshot=None)
    runs = server.get_json("/history").values()
    texts = [run["outputs"]["3"]["text"][0] for run in runs if "text" in run["outputs"].get("3", {})]
    assert seen["outcome"] == "success" and seen["visible"]
    assert seen["text"] == texts[-1] and "changed" in seen["text"]
    assert seen["before"] == seen["after"] == ["make it blue"]
    assert [problem for problem in seen["problems"] if "iptych" in problem] == []


def test_numbers_that_meant_auto_read_as_auto(page, vue, comfyui):  # noqa: F811
    """A node saved with zeros opens with words, sends what means the same, and tells the presets' values."""
    saved = ["shapes demo (512 pairs)", "tiny sd_inpaint (bundled)", 40, "mine", "auto", "fast", ""]
    saved += [0, 24, 0, 0, 0, "auto", 10, 10, 0]
    node = {"id": 1, "type": "DiptychTrainGRPO", "size": [400, 900], "widgets_values": saved}
    seen = page(
        do="auto", workflow=graph(node), vue=vue, type="DiptychTrainGRPO", presets=["fast", "flow-grpo"]
    )
    assert {name: seen["values"][name] for name in ("group_size", "groups", "learning_rate")} == {
        "group_size": "auto",
        "groups": "24",
        "learning_rate": "auto",
    }
    schema = NODE_CLASS_MAPPINGS["DiptychTrainGRPO"].INPUT_TYPES()
    assert checked(schema, {name: seen["sent"][name] for name in ("group_size", "groups", "rank")}) == {
        "group_size": 0,
        "groups": 24,
        "rank": 0,
    }
    for preset, words in seen["words"].items():
        recipe = read(PRESETS[preset])
        assert (
            words.startswith(f"auto: group_size {recipe['group_size']}, ") and "learning_rate 5e-4" in words
        )
    assert [problem for problem in seen["problems"] if "iptych" in problem] == []


def test_hovering_a_token_of_a_mask_tells_its_256_values(page, vue, comfyui, server):  # noqa: F811
    """Against `pack_mask`, which tests/parity holds to diffusers' pipeline."""
    mask = torch.rand(48, 80, generator=torch.Generator().manual_seed(int(vue))).round() * 255
    Image.fromarray(mask.byte().numpy()).save(server.base / "input" / f"tokens_{vue}.png")
    loader = {
        "id": 1,
        "type": "LoadImageMask",
        "size": [300, 300],
        "outputs": [{"name": "MASK", "type": "MASK", "links": [1]}],
        "widgets_values": [f"tokens_{vue}.png", "red", "image"],
    }
    packer = {"id": 2, "type": "DiptychMaskPacker", "size": [480, 440]} | {
        "inputs": [{"name": "mask", "type": "MASK", "link": 1}],
        "outputs": [
            {"name": "mask_tokens", "type": "DIPTYCH_MASK_TOKENS"},
            {"name": "mask", "type": "MASK"},
            {"name": "preview", "type": "IMAGE", "links": [2]},
        ],
        "widgets_values": [0, True, 0, False, "stretch"],
    }
    inputs = [{"name": "images", "type": "IMAGE", "link": 2}]
    shown = {"id": 3, "type": "PreviewImage", "size": [300, 300], "inputs": inputs}
    links = [[1, 1, 0, 2, 0, "MASK"], [2, 2, 2, 3, 0, "IMAGE"]]
    workflow = graph(loader, packer, shown, links=links)
    seen = page(do="mask", workflow=workflow, vue=vue, tokens=[[2, 3], [0, 4]], screenshot=None)
    assert seen["outcome"] == "success"
    tokens = pack_mask(mask[None] / 255)[0]
    for one, (row, column) in zip(seen["seen"], [(2, 3), (0, 4)], strict=True):
        assert (one["row"], one["column"]) == (row, column)
        assert one["channels"] == tokens[5 * row + column].tolist()
        part = mask[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] / 255
        assert one["pixels"] == part.flatten().tolist()
        assert f"token {5 * row + column}, rows {16 * row} " in one["caption"]
    assert [problem for problem in seen["problems"] if "iptych" in problem] == []
