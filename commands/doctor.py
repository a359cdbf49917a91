"""`diptych doctor`: what is installed, what is missing, and what to do about it.

Exit code 0 if the pack can run. Missing models or ComfyUI are told, not counted as faults: the bundled tiny
models run without them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from .. import missing
from . import engines, installed
from .answers import Answer
from .engines import Finding

PYTHONS = ((3, 10), (3, 13))
TORCH = "2.4"
COMFYUI = "0.3.64"


def add_parser(subparsers) -> None:
    """Add `diptych doctor` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "doctor", help="say what is installed, what is missing and what to do about it"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Answer:
    """Print every finding; the exit code is 1 if there is a fault, else 0."""
    marks = {"ok": "[ ok ]", "missing": "[ -- ]", "fault": "[FAIL]"}
    faults, sections = 0, []
    for title, findings in examine():
        print(title)
        sections.append({"title": title, "findings": []})
        for finding in findings:
            sections[-1]["findings"].append(finding._asdict())
            faults += finding.state == "fault"
            print(f"  {marks[finding.state]} {finding.what}")
            if finding.remedy:
                print(f"         -> {finding.remedy}")
    print()
    if faults:
        print(f"{faults} thing(s) to fix before the pack can run.")
        return Answer({"sections": sections, "faults": faults}, 1)
    print('The pack can run. Try: diptych edit   (or: diptych edit photo.png "make the sky orange")')
    return Answer({"sections": sections, "faults": 0})


def examine() -> Iterator[tuple[str, Iterable[Finding]]]:
    """Each section's title and its findings, slow ones last."""
    yield "Python and libraries", [python(), *libraries()]
    yield "Compute", compute()
    comfyuis = installed.all_comfyui_folders()
    yield "ComfyUI", comfyui(comfyuis)
    yield "Models", [*engines.tiny(), *engines.engines(comfyuis)]
    yield "Page and judges", [*engines.web(), *engines.judges()]


def python() -> Finding:
    """Whether this Python is one that the pack is tested with."""
    version = sys.version_info[:2]
    what = f"Python {platform.python_version()} ({sys.executable})"
    if PYTHONS[0] <= version <= PYTHONS[1]:
        return Finding("ok", what)
    span = " to ".join(".".join(map(str, bound)) for bound in PYTHONS)
    return Finding("fault", what, f"use Python {span}")


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu -> (2, 13, 0)."""
    # Not packaging.version: the doctor speaks when nothing at all is installed.
    return tuple(int(part) for part in re.match(r"[\d.]*", version).group().split(".") if part)


def requirements() -> list[tuple[str, str]]:
    """(package, lower bound) of the run-time dependencies: requirements.txt, or the installed metadata."""
    path = installed.PACK / "requirements.txt"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        lines = [line for line in importlib.metadata.requires(missing.DISTRIBUTION) or [] if ";" not in line]
    found = (re.match(r"\s*([\w.-]+)\s*>=\s*([\d.]+)", line) for line in lines)
    return [match.groups() for match in found if match]


def libraries() -> Iterator[Finding]:
    """Whether each run-time dependency is here and new enough."""
    for name, bound in requirements():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("fault", f"{name} is not installed", f'pip install "{name}>={bound}"')
            continue
        if numbers(version) < numbers(bound):
            remedy = f'pip install "{name}>={bound}"'
            yield Finding("fault", f"{name} {version} is older than {bound}", remedy)
        else:
            yield Finding("ok", f"{name} {version} (needs {bound})")


def compute() -> Iterator[Finding]:
    """torch, the GPUs it can use with their memory in GiB, and main memory."""
    try:
        import torch
    except ImportError:
        yield Finding("fault", "torch is not installed", missing.TORCH.partition(": ")[2])
        return
    if numbers(torch.__version__) < numbers(TORCH):
        yield Finding("fault", f"torch {torch.__version__} is older than {TORCH}", "install a newer torch")
    else:
        yield Finding("ok", f"torch {torch.__version__} (needs {TORCH})")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = device.total_memory / 2**30
            advice = (
                "" if memory > 36 else "FLUX in bfloat16 wants about 34 GiB: add --offload to diptych edit"
            )
            yield Finding("ok", f"GPU {index}: {device.name}, {memory:.0f} GiB", advice)
    elif torch.backends.mps.is_available():
        yield Finding("ok", "GPU: Apple MPS")
    else:
        advice = "the tiny models run on the CPU; FLUX needs a GPU to be practical"
        if installed.nvidia_gpu() and torch.version.cuda is None:
            advice = missing.CUDA
        yield Finding(
            "missing", f"no GPU that torch can use, CPU with {torch.get_num_threads()} threads", advice
        )
    memory = main_memory()
    if memory:
        yield Finding("ok", f"main memory: {memory:.0f} GiB")


def main_memory() -> float | None:
    """In GiB; None where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None


def comfyui(folders: list[Path]) -> Iterator[Finding]:
    """What each ComfyUI folder is, how old, and whether it holds this pack."""
    if not folders:
        remedy = "set COMFYUI_PATH to its folder, or clone https://github.com/comfyanonymous/ComfyUI"
        yield Finding("missing", "no ComfyUI found (the command line runs without it)", remedy)
    for folder in folders:
        if not installed.is_comfyui(folder):
            yield Finding("missing", f"{folder} is not a ComfyUI folder", "correct COMFYUI_PATH")
            continue
        version = installed.comfyui_version(folder)
        what = f"ComfyUI {version or 'of unknown version'} in {folder}"
        old = version and numbers(version) < numbers(COMFYUI)
        yield Finding("missing" if old else "ok", what, f"update it to {COMFYUI} or newer" if old else "")
        if not installed.holds_pack(folder):
            remedy = f"put or link {installed.PACK} into {folder / 'custom_nodes'}"
            yield Finding("missing", "this pack is not in its custom_nodes", remedy)
