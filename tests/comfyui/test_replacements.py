"""Workflows of ICEdit-ComfyUI-official run with this pack alone.

A prompt with its nodes makes what core's nodes make; the page swaps them, links and values kept.
"""

from __future__ import annotations

import io
import json
from urllib.error import HTTPError
from urllib.parse import quote

import icedit_official
import numpy as np
import pytest
from PIL import Image
from test_browser import browser, page  # noqa: F401  (fixtures)

FILE = "icedit_official.png"


@pytest.fixture(scope="module")
def asked(server):
    """A server that knows of replacements, with the image of the test in its input folder."""
    try:
        replacements = server.get_json("/node_replacements")
    except HTTPError:
        pytest.skip("this ComfyUI knows no replacements")
    assert {"DiptychCreate", "InContextEditInstruction", "ICEFConditioning"} <= replacements.keys()
    noise = np.random.default_rng(3).integers(0, 255, (8, 16, 3), dtype=np.uint8)
    size = icedit_official.WIDTH, icedit_official.HEIGHT
    Image.fromarray(noise).resize(size, Image.BICUBIC).save(server.base / "input" / FILE)
    return server


def made(server, prompt: dict) -> dict[str, np.ndarray]:
    result = server.run(prompt)
    assert result["status"]["status_str"] == "success", result["status"]["messages"]
    found = {}
    for step in ("save", "whole"):
        [image] = result["outputs"][step]["images"]
        query = "&".join(f"{key}={quote(image[key])}" for key in ("filename", "subfolder", "type"))
        found[step] = np.array(Image.open(io.BytesIO(server.get(f"/view?{query}"))).convert("RGB")).astype(
            int
        )
    return found


@pytest.mark.parametrize("connected", [False, True], ids=["its file", "an image connected"])
def test_their_prompt_makes_what_cores_nodes_make(asked, connected):
    wanted = made(asked, icedit_official.core(FILE, "core"))
    got = made(asked, icedit_official.theirs(FILE, "theirs", connected))
    assert (got["whole"] == wanted["whole"]).all()
    assert np.ptp(got["save"]) > 20 and abs(got["save"] - wanted["save"]).max() <= 1


def test_the_page_swaps_their_nodes_and_runs(asked, request, tmp_path):
    """View details, Replace All, Run. The bypassed node of a third pack that theirs have stays missing."""
    shared = tmp_path / "shared.json"
    shared.write_text(json.dumps(icedit_official.page(FILE)), encoding="utf-8")
    ours = ["DiptychLoadImage", "DiptychInstruction", "DiptychFluxFillConditioner"]
    seen = request.getfixturevalue("page")(do="replace", workflow=str(shared), becomes=ours)
    assert seen["missing"] == ["easy cleanGpuUsed"] and seen["outcome"] == "success"
