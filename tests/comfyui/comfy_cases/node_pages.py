"""Every node loads in ComfyUI and explains itself: names, tooltips, help page, an example workflow."""

from __future__ import annotations

import json

from . import ROOT, case, node_ids

IDS = {
    "DiptychBuilder",
    "DiptychSplit",
    "DiptychMaskPacker",
    "DiptychFluxFillConditioner",
    "DiptychKontextConditioner",
    "DiptychGRPOLoraLoader",
    "DiptychFlowMatchScheduler",
    "DiptychFlowMatchEulerSampler",
    "DiptychTinyModelLoader",
}


@case
def the_pack_loads_under_a_hyphenated_folder_name(host):
    assert host.loaded is True
    assert set(host.pack_nodes) >= IDS
    assert host.comfy_nodes.EXTENSION_WEB_DIRS["ComfyUI-Diptych"].endswith("web")


@case(each=node_ids)
def it_explains_itself(host, node):
    cls = host.nodes[node]
    assert cls.__name__ == node and host.comfy_nodes.NODE_DISPLAY_NAME_MAPPINGS[node] == cls.DISPLAY_NAME
    assert cls.CATEGORY.split("/")[0] == "diptych"
    assert len(cls.DESCRIPTION) > 40
    outputs = len(cls.RETURN_TYPES)
    assert len(cls.RETURN_NAMES) == outputs and len(cls.OUTPUT_TOOLTIPS) == outputs
    assert all(cls.OUTPUT_TOOLTIPS) and cls.SEARCH_ALIASES
    schema = cls.INPUT_TYPES()
    json.dumps(schema)  # /object_info sends it
    for group in ("required", "optional"):
        for name, definition in schema.get(group, {}).items():
            assert len(definition[1].get("tooltip", "")) > 10, f"{name} has no tooltip"


@case
def no_title_is_one_that_another_node_has(host):
    titles = host.comfy_nodes.NODE_DISPLAY_NAME_MAPPINGS
    core = {titles.get(node, node) for node in host.nodes if node not in host.pack_nodes}
    ours = [titles[node] for node in host.pack_nodes]
    assert len(set(ours)) == len(ours) and not core & set(ours), core & set(ours)


@case(each=node_ids)
def its_widgets_end_with_the_advanced_ones(host, node):
    schema = host.nodes[node].INPUT_TYPES()
    for group in ("required", "optional"):
        widgets = [
            definition[1].get("advanced", False)
            for definition in schema.get(group, {}).values()
            if isinstance(definition[0], (list, tuple))
            or definition[1].get("widgetType", definition[0]) in ("INT", "FLOAT", "STRING", "BOOLEAN")
        ]
        assert widgets == sorted(widgets), f"advanced before common among {list(schema[group])}"


@case(each=node_ids)
def its_help_page_names_every_input_and_output(host, node):
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    cls = host.nodes[node]
    schema = cls.INPUT_TYPES()
    names = [*schema.get("required", {}), *schema.get("optional", {}), *cls.RETURN_NAMES]
    missing = [name for name in names if name not in page]
    assert not missing, f"not in {node}.md: {missing}"
    assert page.startswith("# ") and "example" in page.lower()
