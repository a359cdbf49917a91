"""The example in docs/multimodal.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PAGE = Path(__file__).parents[3] / "docs" / "multimodal.md"


def test_the_example_runs_without_the_hub(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    lines = [line for line in code.splitlines() if "from the Hub" not in line]
    assert len(lines) == len(code.splitlines()) - 1
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.rand(2, 64, 64, 3), "captions": ["a red circle", "a circle"]}
    exec("\n".join(lines), names)  # noqa: S102
    assert names["drawn"].shape == (2, 56, 56, 3)
    assert [len(row) for row in names["captions"]] == [3, 3]
    assert names["scores"].shape == (2, 2)
    assert names["losses"].diffusion.isfinite()
