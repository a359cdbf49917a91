"""Checkpoints are whole or absent, the last K stay, and generators come back exactly."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
from comfyui_diptych.training import checkpoint


def write(root, step, keep=2):
    with checkpoint.Writer(root, step, keep) as writer:
        writer.tensors("trained.safetensors", {"a": torch.full((2,), float(step))})
        writer.state({"step": step})
    return writer.final


def test_the_last_two_are_kept_and_the_newest_is_found(tmp_path):
    for step in (5, 10, 15):
        write(tmp_path, step)
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step_00000010", "step_00000015"]
    newest = checkpoint.find(tmp_path, "auto")
    assert checkpoint.read_tensors(newest, "trained.safetensors")["a"].tolist() == [15.0, 15.0]
    assert checkpoint.find(tmp_path / "none", "auto") is None


def test_an_unfinished_checkpoint_is_never_taken_for_one(tmp_path):
    write(tmp_path, 5)
    (tmp_path / ".writing_step_00000010").mkdir()
    (tmp_path / "step_00000011").mkdir()  # no state.json
    assert checkpoint.find(tmp_path, "auto").name == "step_00000005"


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 5)

    def full(self, name, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Writer, "tensors", full)
    with pytest.raises(checkpoint.TrainingError, match="No space left.*step_00000005 is intact"):
        write(tmp_path, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def test_generators_continue_where_they_were(tmp_path):
    torch.save(checkpoint.rng_state(), tmp_path / "rng.pt")
    expected = torch.rand(3), np.random.rand(3), random.random()
    checkpoint.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(expected[0], again[0]) and (expected[1] == again[1]).all() and expected[2] == again[2]


def test_a_checkpoint_of_another_recipe_is_refused():
    with pytest.raises(ValueError, match="was the recipe changed"):
        checkpoint.copy_into({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, "step_1")
    with pytest.raises(ValueError, match="b is on one side only"):
        checkpoint.copy_into({"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(1)}, "step_1")
