"""What to say of what is not here: a library and the command that installs it, a page of the documentation.

Standard library only. Nodes and the command line say the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

OPTIONAL = (
    "datasets",
    "prodigyopt",
    "tensorboard",
    "bitsandbytes",
    "deepspeed",
    "wandb",
    "lycoris",
    "open_clip",
    "gradio",
)
DISTRIBUTION = "diptych"  # its name in pyproject.toml, and so on registry.comfy.org and for pip
DOCS = "https://github.com/comfyui-diptych/ComfyUI-Diptych/blob/main/docs"
PACKAGES = {"yaml": "pyyaml", "PIL": "pillow", "open_clip": "open_clip_torch"}


def page(name: str) -> str:
    """Where a page of the documentation is: in this tree, or on the web, since a wheel has none."""
    file = Path(__file__).parent / "docs" / name
    return str(file) if file.is_file() else f"{DOCS}/{name}"


def pip_install() -> str:
    """The command that installs what the pack needs into the Python that runs it."""
    file = Path(__file__).parent / "requirements.txt"
    what = f'-r "{file}"' if file.is_file() else DISTRIBUTION
    return f'"{sys.executable}" -m pip install {what}'


def sentence(error: ImportError) -> str:
    """What is missing and the command that installs it."""
    name = (error.name or "").split(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not name:
        return f"a library cannot be imported ({error}): {pip_install()} --upgrade"
    package = PACKAGES.get(name, name)
    if name == "torch":
        return "torch is not installed: install PyTorch for your machine, see https://pytorch.org"
    remedy = f'"{sys.executable}" -m pip install {package}' if name in OPTIONAL else pip_install()
    return f"{package} is not installed: run {remedy}"
