"""Checkpoints are whole or absent, the last K stay, and generators come back exactly."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
from comfyui_diptych.training.runtime import checkpoint, random_streams


def write(root, step, keep=2):
    with checkpoint.Writer(root, step, keep) as writer:
        writer.tensors("trained.safetensors", {"a": torch.full((2,), float(step))})
        torch.save({"step": step}, writer.folder / "optimizer.pt")
        writer.state({"step": step})
    return writer.final


def test_the_last_two_are_kept_and_the_newest_is_found(tmp_path):
    for step in (5, 10, 15):
        write(tmp_path, step)
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step_00000010", "step_00000015"]
    newest = checkpoint.find(tmp_path, "auto").folder
    assert checkpoint.read_tensors(newest, "trained.safetensors")["a"].tolist() == [15.0, 15.0]
    assert checkpoint.find(tmp_path / "none", "auto") is None


def test_an_unfinished_checkpoint_is_never_taken_for_one(tmp_path):
    write(tmp_path, 5)
    (tmp_path / ".writing_step_00000010").mkdir()
    (tmp_path / "step_00000011").mkdir()  # no state.json
    assert checkpoint.find(tmp_path, "auto").folder.name == "step_00000005"


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 5)

    def full(self, name, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Writer, "tensors", full)
    with pytest.raises(checkpoint.TrainingError, match="No space left.*step_00000005 is intact"):
        write(tmp_path, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def damage(folder, name, how):
    path = folder / name
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, caplog, name, how):
    if (name, how) == ("state.json", "flipped"):
        how = "cut"
    for step in (5, 10):
        write(tmp_path, step)
    damage(tmp_path / "step_00000010", name, how)
    with caplog.at_level("WARNING"):
        found = checkpoint.find(tmp_path, "auto")
    assert found.folder.name == "step_00000005" and not found.lacking
    assert f"step_00000010 is damaged ({name}" in caplog.text and "going on from" in caplog.text
    assert (tmp_path / "damaged_step_00000010").is_dir()
    write(tmp_path, 8, keep=1)  # a damaged one is not counted among those to keep
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step_00000008"]


def test_without_a_whole_checkpoint_the_newest_with_its_weights_is_taken(tmp_path, caplog):
    for step in (5, 10):
        write(tmp_path, step)
    damage(tmp_path / "step_00000005", "trained.safetensors", "cut")
    damage(tmp_path / "step_00000010", "optimizer.pt", "gone")
    with caplog.at_level("WARNING"):
        found = checkpoint.find(tmp_path, "auto")
    assert found.folder.name == "step_00000010" and found.lacking == ("optimizer.pt",)
    assert not found.has("optimizer.pt") and found.has("trained.safetensors")
    assert "optimizer.pt is missing" in caplog.text and "begins anew" in caplog.text


def test_nothing_but_damaged_checkpoints_is_no_beginning(tmp_path):
    write(tmp_path, 5)
    damage(tmp_path / "step_00000005", "trained.safetensors", "flipped")
    with pytest.raises(
        ValueError, match="trained.safetensors has other content.*none can be resumed, remove"
    ):
        checkpoint.find(tmp_path, "auto")
    with pytest.raises(ValueError, match="resume: checkpoint .* is damaged .*: use auto"):
        checkpoint.find(tmp_path, str(tmp_path / "step_00000005"))


def test_going_back_does_not_mix_with_later_checkpoints(tmp_path, caplog):
    for step in (5, 10):
        write(tmp_path, step)
    five = str(tmp_path / "step_00000005")
    assert checkpoint.find(tmp_path / "else", five).folder.name == "step_00000005"
    assert len(checkpoint.folders(tmp_path)) == 2
    with caplog.at_level("WARNING"):
        assert checkpoint.find(tmp_path, five).folder.name == "step_00000005"
    assert "going back" in caplog.text and "is kept as later_step_00000010" in caplog.text
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step_00000005"]
    assert not checkpoint.faults(tmp_path / "later_step_00000010")


def test_what_a_kill_left_behind_is_swept(tmp_path):
    write(tmp_path, 5)
    for name in (".writing_step_00000006", ".old_step_00000004"):
        (tmp_path / name).mkdir()
    checkpoint.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def test_another_error_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="^shapes differ$"):
        with checkpoint.Writer(tmp_path, 5, 1):
            raise RuntimeError("shapes differ")
    assert not list(tmp_path.iterdir())
    with pytest.raises(checkpoint.TrainingError, match="see that its disk can be written"):
        with checkpoint.Writer(tmp_path, 5, 1):
            raise OSError(30, "Read-only file system")


def test_generators_continue_where_they_were(tmp_path):
    torch.save(random_streams.rng_state(), tmp_path / "rng.pt")
    expected = torch.rand(3), np.random.rand(3), random.random()
    random_streams.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(expected[0], again[0]) and (expected[1] == again[1]).all() and expected[2] == again[2]


def test_a_checkpoint_of_another_recipe_is_refused():
    with pytest.raises(ValueError, match="was the recipe changed"):
        checkpoint.copy_into({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, "step_1")
    with pytest.raises(ValueError, match="b is on one side only"):
        checkpoint.copy_into({"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(1)}, "step_1")
