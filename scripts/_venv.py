"""The virtual environment of demo.py and test.py: made once in .venv, then reused.

Standard library only, on any system. Rules for torch: one that is installed is used and never replaced;
without an NVIDIA GPU the CPU build is installed; with one, PyPI's.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "diptych-setup.json"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYTHONS = ((3, 10), (3, 13))


def ensure(extra: str = "") -> Path:
    """The Python of a .venv that has the pack installed in place, with an extra such as "test"."""
    inputs = _fingerprint()
    extras = set(_stamp(inputs)) if _runs("-c", "") else set()
    if extras and extra in {"", *extras}:
        return PYTHON
    _make()
    _provide_torch()
    torch = _torch_version()
    _say("installing the pack and what it needs" + (f" (extra: {extra})" if extra else ""))
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder) / "torch.txt"
        constraint.write_text(f"torch=={torch}\n", encoding="utf-8")
        _pip("-e", f"{ROOT}[{extra}]" if extra else str(ROOT), "-c", str(constraint))
    STAMP.write_text(json.dumps({"inputs": inputs, "extras": sorted({"", extra, *extras})}), encoding="utf-8")
    return PYTHON


def _fingerprint() -> str:
    """Of what the environment depends on: where the pack lies, and its lists of dependencies."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in ("requirements.txt", "pyproject.toml", "constraints-cpu.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _stamp(inputs: str) -> list[str]:
    """The extras that were installed from the same inputs."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return stamp["extras"] if stamp.get("inputs") == inputs else []


def _make() -> None:
    if not _runs("-c", ""):
        if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
            span = " to ".join(".".join(map(str, bound)) for bound in PYTHONS)
            raise SystemExit(f"this is Python {platform.python_version()}: run it with Python {span}")
        _say(f"making {VENV}")
        shutil.rmtree(VENV, ignore_errors=True)
        if subprocess.run([sys.executable, "-m", "venv", str(VENV)]).returncode:
            raise SystemExit("no virtual environment could be made (on Debian: apt install python3-venv)")
    if not _runs("-m", "pip", "--version") and not _runs("-m", "ensurepip"):
        raise SystemExit(f"{VENV} has no pip: delete the folder and run this again")


def _provide_torch() -> None:
    if _torch_version():
        return
    found = importlib.util.find_spec("torch")
    if found and found.origin:
        # A .pth line lets the environment, and its pip, see the packages beside this interpreter's torch.
        # Unlike --system-site-packages it also works when this interpreter is itself a virtual environment.
        library = Path(found.origin).parents[1]
        _say(f"using torch {importlib.metadata.version('torch')} of {library}")
        (_site_packages() / "diptych-host-torch.pth").write_text(f"{library}\n", encoding="utf-8")
    elif _has_nvidia():
        _say("installing torch for this machine's NVIDIA GPU")
        _pip("torch")
    else:
        _install_cpu_torch()
    if not _torch_version():
        raise SystemExit("torch cannot be imported after installing it: delete .venv and run this again")


def _install_cpu_torch() -> None:
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints-cpu.txt").read_text(encoding="utf-8"), re.M)[1]
    _say(f"installing torch {pinned} for the CPU")
    if sys.platform == "darwin":  # PyPI has no other build for it
        _pip(f"torch=={pinned}")
        return
    index = ("--extra-index-url", CPU_INDEX) if _answers(f"{CPU_INDEX}/torch/") else ()
    # "+cpu" cannot match PyPI's CUDA build, so this either finds the small one or fails before downloading.
    if not _pip(f"torch=={pinned}+cpu", *index, must=False):
        _say("no CPU build was found: taking the one on PyPI, which brings CUDA on Linux")
        _pip(f"torch=={pinned}")


def _has_nvidia() -> bool:
    tool = shutil.which("nvidia-smi")
    if not tool:
        return False
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def _answers(url: str) -> bool:
    """Whether a server is there; pip itself would retry an unreachable one for a minute or more."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (OSError, ValueError):
        return False


def _torch_version() -> str:
    """Of the environment, "" if it has none."""
    code = "import torch; print(torch.__version__)"
    return subprocess.run([PYTHON, "-c", code], capture_output=True, text=True).stdout.strip()


def _site_packages() -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([PYTHON, "-c", code], capture_output=True, text=True).stdout.strip())


def _runs(*arguments: str) -> bool:
    return PYTHON.is_file() and subprocess.run([PYTHON, *arguments], capture_output=True).returncode == 0


def _pip(*arguments: str, must: bool = True) -> bool:
    quiet = () if sys.stdout.isatty() else ("--quiet",)
    options = ("--disable-pip-version-check", "--no-compile", *quiet)
    silent = {} if must else {"stderr": subprocess.DEVNULL}
    done = subprocess.run([PYTHON, "-m", "pip", "install", *options, *arguments], **silent).returncode == 0
    if must and not done:
        raise SystemExit("pip could not install that; its own message is above")
    return done


def _say(text: str) -> None:
    print(f"[diptych] {text}", flush=True)
