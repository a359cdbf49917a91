"""The cases of `comfy_cases`, one test each, in every ComfyUI that is found."""

from __future__ import annotations

import pytest


def test_case(comfyui, child, comfy_case):
    result = child.result(comfy_case)
    if result["outcome"] == "skipped":
        pytest.skip(result["detail"])
    if result["outcome"] == "failed":
        pytest.fail(result["detail"], pytrace=False)
