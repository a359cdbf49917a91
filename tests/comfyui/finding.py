"""Which interpreter runs a ComfyUI, and a scratch base folder that keeps its checkout clean."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOW_TO_GET_ONE = (
    "no ComfyUI found: set COMFYUI_PATH to its folder (several: separate with the path separator), or clone "
    "https://github.com/comfyanonymous/ComfyUI and install its requirements.txt and this pack's in its .venv"
)


def interpreter(comfyui: Path) -> str:
    """COMFYUI_PYTHON, else the venv in ComfyUI's folder, else this interpreter."""
    if os.environ.get("COMFYUI_PYTHON"):
        return os.environ["COMFYUI_PYTHON"]
    below = ("Scripts/python.exe",) if os.name == "nt" else ("bin/python",)
    candidates = [comfyui / venv / python for venv in (".venv", "venv") for python in below]
    return str(next((path for path in candidates if path.is_file()), sys.executable))


def environment() -> dict[str, str]:
    """This environment without what would leak the test interpreter's packages into ComfyUI's."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error"}


def make_base(base: Path, comfyui: Path) -> Path:
    """A folder for `--base-directory`: the pack under a hyphenated name, and ComfyUI's example image."""
    for name in ("custom_nodes", "input", "output", "user", "temp", "models/loras"):
        (base / name).mkdir(parents=True)
    pack = base / "custom_nodes" / "ComfyUI-Diptych"
    try:
        pack.symlink_to(ROOT, target_is_directory=True)
    except OSError:  # Windows without the right to make links
        shutil.copytree(ROOT, pack, ignore=shutil.ignore_patterns(".git", ".venv", "node_modules", "runs"))
    example = comfyui / "input" / "example.png"
    if example.is_file():
        shutil.copy(example, base / "input")
    return base
