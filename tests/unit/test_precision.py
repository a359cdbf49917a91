"""Mixed precision `auto`: bfloat16 where the device has units for it."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.training import recipes
from comfyui_diptych.training.runtime import processes
from comfyui_diptych.training.runtime.precision import bf16_is_fast

pytest.importorskip("accelerate")


@pytest.mark.parametrize(
    ("units", "fast"),
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx2": True, "amx_bf16": False}, False)],
)
def test_a_cpu_is_asked_for_its_units(monkeypatch, units, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert bf16_is_fast("cpu") is fast


def test_a_torch_that_cannot_say_is_not_trusted(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not bf16_is_fast("cpu")
    assert not bf16_is_fast("mps")


@pytest.mark.parametrize(
    ("choice", "units", "wanted"),
    [("auto", True, "bf16"), ("auto", False, "no"), ("no", True, "no"), ("bf16", False, "bf16")],
)
def test_a_run_computes_in_what_auto_finds(monkeypatch, tmp_path, choice, units, wanted):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": units}, raising=False)
    c = recipes.from_dict({"task": "fill", "model": "m", "mixed_precision": choice, "log_with": ["none"]})
    assert processes.start(c, tmp_path).accelerator.mixed_precision == wanted
