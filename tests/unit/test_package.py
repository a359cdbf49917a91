"""The package is cheap to import and complete as a ComfyUI pack."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from comfyui_diptych import missing

ROOT = Path(__file__).parents[2]
HEAVY = {"diffusers", "transformers", "peft", "accelerate", "datasets", "comfy", "gradio"}


def test_import_loads_no_heavy_library():
    code = "import sys, comfyui_diptych, comfyui_diptych.models.multimodal, comfyui_diptych.commands.web; "
    code += "print(' '.join(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not HEAVY & set(loaded)


@pytest.mark.skipif(
    shutil.which("ruff") is None and find_spec("ruff") is None, reason="ruff is not installed"
)
@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_the_tree_is_ruff_clean(command):
    run = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-2000:]


def test_requirements_leave_torch_to_the_host():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    names = {line.partition(">=")[0].lower() for line in lines}
    assert names == {
        "diffusers", "transformers", "safetensors", "peft", "accelerate", "einops", "numpy", "pillow"
    }  # fmt: skip


def test_every_package_folder_is_installed():
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    rooms = ("commands", "models", "nodes", "page", "samplers", "training")
    for init in (path for room in rooms for path in (ROOT / room).rglob("__init__.py")):
        assert f'"comfyui_diptych.{".".join(init.parent.relative_to(ROOT).parts)}"' in listed


def test_an_installed_package_has_every_file_that_the_code_reads():
    """By the globs of pyproject.toml, which are all that says what goes into a wheel."""
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = [ROOT.joinpath(*name.split(".")[1:]) for name in listed["packages"]]
    packed = {path for folder in folders for path in folder.glob("*.py")}
    for pattern in listed["package-data"]["comfyui_diptych"]:
        packed |= set(ROOT.glob(pattern))
    rooms = (
        "commands",
        "models",
        "nodes",
        "page",
        "samplers",
        "training",
        "web",
        "locales",
        "example_workflows",
        "subgraphs",
    )
    needed = {path for room in rooms for path in (ROOT / room).rglob("*") if path.is_file()}
    needed = {path for path in needed if "__pycache__" not in path.parts and path.name != ".DS_Store"}
    assert len(needed) > 100 and not sorted(str(path) for path in needed - packed)


def test_the_code_knows_the_name_it_is_published_under():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == missing.DISTRIBUTION and "comfyui" not in project["name"].lower()


def test_what_the_registry_asks_for_is_there():
    """https://docs.comfy.org/registry/specifications: an icon of at most 400 px, square; a banner of 21:9."""
    tomllib = pytest.importorskip("tomllib")
    image = pytest.importorskip("PIL.Image")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    comfy, project = listed["tool"]["comfy"], listed["project"]
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= comfy.keys()
    assert project["license"] == "Apache-2.0" and "Repository" in project["urls"]
    icon, banner = (image.open(ROOT / comfy[key].partition("/main/")[2]).size for key in ("Icon", "Banner"))
    assert icon[0] == icon[1] <= 400 and banner[0] * 9 == banner[1] * 21
