"""The tests run in a folder of any name and place: what a clone, an archive or a custom node is called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = ["ComfyUI-Diptych", "my pack.v2", "ComfyUI/custom_nodes/comfyui-diptych-main"]
TEST = "import comfyui_diptych\n\n\ndef test_which():\n    print(comfyui_diptych.__file__)\n"


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_of_any_name_tests_itself(place, tmp_path):
    tree = tmp_path / place
    (tree / "tests/unit").mkdir(parents=True)
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "__init__.py").write_text("from . import part\n", encoding="utf-8")
    (tree / "part.py").touch()
    (tree / "tests/unit/test_which.py").write_text(TEST, encoding="utf-8")
    if "custom_nodes" in place:  # ComfyUI has an ini file of its own
        (tmp_path / "ComfyUI/pytest.ini").write_text("[pytest]\ntestpaths = tests-unit\n", encoding="utf-8")
    for cwd, arguments in ((tree, []), (tmp_path, [str(tree)])):
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-s", *arguments],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
        assert str(tree / "__init__.py") in run.stdout
