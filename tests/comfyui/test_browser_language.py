"""In a real browser, set to Chinese: the page shows what `locales/zh` says; workflows keep their values."""

from __future__ import annotations

import json

import comfy_cases
import pytest
from comfyui_diptych.commands import installed
from test_browser import browser, has_nodes_2, page  # noqa: F401  (fixtures)

CHINESE = json.loads((comfy_cases.ROOT / "locales/zh/nodeDefs.json").read_text(encoding="utf-8"))
NOTES = json.loads((comfy_cases.ROOT / "web/notes/zh.json").read_text(encoding="utf-8"))


@pytest.fixture
def chinese_page(server, page):  # noqa: F811
    server.post("/api/settings/Comfy.Locale", "zh")
    yield page
    server.post("/api/settings/Comfy.Locale", "en")


def wrong(shown: dict, entry: dict, labels_shown: bool) -> list[str]:
    """What a node shows otherwise than its entry says; files and what the page adds keep their names."""
    names = {name: given["name"] for name, given in entry["inputs"].items()}
    options = {name: given.get("options", {}) for name, given in entry["inputs"].items()}
    labels = {name: label for name, label in shown["widgets"].items() if name in names}
    slots = {name: label for name, label in shown["inputs"].items() if name in names}
    menus = {
        name: {v: options.get(name, {}).get(v, v) for v in menu} for name, menu in shown["options"].items()
    }
    right = {
        "title": shown["title"] == entry["display_name"],
        "description": shown["description"] == entry["description"],
        "category": shown["category"].startswith("Diptych 双联画"),
        "inputs": slots.items() <= names.items() and labels.items() <= names.items(),
        "every input": {*slots, *labels, "compare_view"} >= set(names),
        "outputs": shown["outputs"] == [given["name"] for given in entry["outputs"].values()],
        "options": shown["options"] == menus,
        "what stands in the menus": all(
            menus[name][value] == text for name, (value, text) in shown["shown"].items()
        ),
    }
    return [what for what, good in right.items() if not good]


@pytest.mark.parametrize("renderer", ["canvas", "nodes 2.0"])
def test_the_page_speaks_chinese(chinese_page, comfyui, renderer):
    if renderer != "canvas" and not has_nodes_2(comfyui):
        pytest.skip("its page has no Nodes 2.0")
    template = comfy_cases.ROOT / "example_workflows" / "Edit by instruction - tiny.json"
    seen = chinese_page(do="language", workflow=str(template), vue=renderer != "canvas")
    labels_shown = tuple(map(int, installed.comfyui_version(comfyui).split("."))) >= (0, 8)  # older: values
    for node, entry in CHINESE.items():
        assert wrong(seen["nodes"][node], entry, labels_shown) == [], node
    assert len(seen["notes"]) == 1 and seen["notes"][0] in NOTES["notes"].values()
    assert {"说明", "双联画", "取出编辑结果", "双联画构建"} <= set(seen["titles"])
    sent = {node["class_type"]: node["inputs"] for node in seen["sent"].values()}
    assert sent["DiptychBuilder"]["side"] == "right" and sent["DiptychSplit"]["paste"] == "auto"
    if renderer != "canvas":
        assert [
            word for word in ("双联画构建", "编辑位置", "右", "贴回方式", "自动") if word not in seen["text"]
        ] == []
    assert [problem for problem in seen["problems"] if "Diptych" in problem] == []


def test_chinese_help_pages_and_texts_are_served(server):
    for node in comfy_cases.node_ids():
        page_text = server.get(f"/extensions/ComfyUI-Diptych/docs/{node}/zh.md").decode("utf-8")
        assert page_text.startswith(f"# {CHINESE[node]['display_name']}\n")
    served = server.get_json("/i18n")
    assert served["zh"]["nodeDefs"].items() >= CHINESE.items()
    assert served["zh"]["nodeCategories"]["outpaint"] == "扩图"
