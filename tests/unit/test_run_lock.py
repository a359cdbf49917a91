"""One run per folder, and no folder without a run."""

from __future__ import annotations

import subprocess
import sys

import pytest
from comfyui_diptych.training.runtime import lock

HOLDER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("lock", sys.argv[1])
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
from pathlib import Path
with lock.held(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_this_process_is_refused_and_named(tmp_path):
    (tmp_path / "x").touch()
    with lock.held(tmp_path):
        with pytest.raises(
            ValueError, match="in use by another run .process .*wait for it, or choose another"
        ):
            with lock.held(tmp_path):
                pass
    with lock.held(tmp_path):
        pass


def test_the_lock_of_another_process_ends_with_it_however_it_ends(tmp_path):
    (tmp_path / "x").touch()
    command = [sys.executable, "-c", HOLDER, lock.__file__, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {holder.pid} on "):
            with lock.held(tmp_path):
                pass
        holder.kill()
        holder.wait()
        with lock.held(tmp_path):
            pass


def test_a_folder_in_which_nothing_was_made_is_taken_away_again(tmp_path):
    with pytest.raises(ValueError, match="refused"):
        with lock.held(tmp_path / "a" / "b"):
            raise ValueError("refused")
    assert not list(tmp_path.iterdir())
    with lock.held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["result"]


def test_only_the_first_process_of_a_run_holds_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with lock.held(tmp_path / "a"):
        assert not (tmp_path / "a").exists()
