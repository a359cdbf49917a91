"""In a real browser: the page offers every model file that a template names and the user lacks."""

from __future__ import annotations

import comfy_cases
import pytest
from test_browser import browser, file, has_nodes_2, page  # noqa: F401  (fixtures)


def offers(name: str) -> list[str]:
    """The lines of the page's list of missing models, one entry each."""
    models = [
        model
        for node in comfy_cases.workflow(name)["nodes"]
        for model in node["properties"].get("models", [])
    ]
    return [f"{model['name']}\n{model['directory']}\nDownload" for model in models]


def test_the_page_offers_to_download_what_a_template_misses(page, comfyui):  # noqa: F811
    if not has_nodes_2(comfyui):
        pytest.skip("its page says it in another way")
    wanted = {name: {"file": file(name), "offers": offers(name)} for name in comfy_cases.workflow_names()}
    wanted = {name: one for name, one in wanted.items() if one["offers"]}
    lacks = page(do="missing", workflows=wanted)["lacks"]
    assert wanted and lacks == {name: [] for name in wanted}
