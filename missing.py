"""What to say of what is not here: a library and the command that installs it, a page of the documentation.

Standard library only. Nodes and the command line say the same.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

DISTRIBUTION = "diptych"  # its name in pyproject.toml, and so on registry.comfy.org and for pip
DOCS = "https://github.com/comfyui-diptych/ComfyUI-Diptych/blob/main/docs"
TORCH = "torch is not installed: install PyTorch for your machine, see https://pytorch.org/get-started"
CUDA = "this torch is built without CUDA: install one for your GPU, see https://pytorch.org/get-started"
REQUIRED = ("diffusers", "transformers", "safetensors", "peft", "accelerate", "einops", "numpy", "PIL")
OPTIONAL = {
    "bitsandbytes",
    "cv2",
    "datasets",
    "deepspeed",
    "gradio",
    "lpips",
    "lycoris",
    "open_clip",
    "prodigyopt",
    "spandrel",
    "tensorboard",
    "wandb",
}
COMFYUI = ("comfy", "comfy_api", "comfy_extras", "folder_paths", "server")  # what no package brings
# What pip calls a module.
PACKAGES = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "open_clip": "open_clip_torch",
    "cv2": "opencv-python-headless",
    "lycoris": "lycoris-lora",
}
BOUNDS = {"gradio": '"gradio>=6.31,<7"'}  # as pyproject.toml has them


def page(name: str) -> str:
    """Where a page of the documentation is: in this tree, or on the web, since a wheel has none."""
    file = Path(__file__).parent / "docs" / name
    return str(file) if file.is_file() else f"{DOCS}/{name}"


def pip_install() -> str:
    """The command that installs what the pack needs into the Python that runs it."""
    file = Path(__file__).parent / "requirements.txt"
    what = f'-r "{file}"' if file.is_file() else DISTRIBUTION
    return f'"{sys.executable}" -m pip install {what}'


def install(module: str) -> str:
    """The command that installs one optional library, by the name it is imported by."""
    package = BOUNDS.get(module, PACKAGES.get(module, module))
    return f'"{sys.executable}" -m pip install {package}'


def lacking(*modules: str) -> str:
    """What of these modules is not installed and the command that installs it, in a sentence; "" if all are.

    Looks for them only, loads none. Without arguments: what the pack's requirements ask for.
    """
    absent = [name for name in modules or REQUIRED if not _found(name)]
    if not absent:
        return ""
    if "torch" in absent:
        return TORCH
    remedy = install(absent[0]) if len(absent) == 1 and absent[0] in OPTIONAL else pip_install()
    names = ", ".join(PACKAGES.get(name, name) for name in absent)
    return f"{names} {'is' if len(absent) == 1 else 'are'} not installed: run {remedy}"


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # in sys.modules without a spec, as a stand-in of a test is
        return sys.modules[module] is not None


def sentence(error: ImportError) -> str:
    """What is missing and the command that installs it."""
    name = (error.name or "").split(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not name:
        return f"a library cannot be imported ({error}): {pip_install()} --upgrade"
    if name == "torch":
        return TORCH
    if name in COMFYUI:
        return "this needs ComfyUI: run it as a node there"
    remedy = install(name) if name in OPTIONAL else pip_install()
    return f"{PACKAGES.get(name, name)} is not installed: run {remedy}"
