"""What `diptych doctor` says of each engine: where its models lie, or how to get them; what judges lack.

Standard library only but for the judges, so that the doctor can speak when everything else is missing.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .. import missing
from . import installed

MODELS = ("diffusion_models", "unet", "checkpoints")
ICEDIT_LORA = "RiverZ/normal-lora"
TINY = ("fill", "kontext", "sd_inpaint", "glid", "multimodal")


class Finding(NamedTuple):
    """state: "ok"; "missing", which the pack can do without; or "fault", which it cannot."""

    state: str
    what: str
    remedy: str = ""


class Engine(NamedTuple):
    """hub: its model there, "" if none is a diffusers folder. words: of its file names in ComfyUI."""

    name: str
    title: str
    hub: str
    words: tuple[str, ...]
    remedy: str


def _flux(name: str) -> str:
    place = f"black-forest-labs/FLUX.1-{name}-dev"
    return f"accept its licence at https://huggingface.co/{place}, then: hf download {place}"


ENGINES = (
    Engine("fill", "FLUX.1 Fill", "black-forest-labs/FLUX.1-Fill-dev", ("fill",), _flux("Fill")),
    Engine(
        "kontext", "FLUX.1 Kontext", "black-forest-labs/FLUX.1-Kontext-dev", ("kontext",), _flux("Kontext")
    ),
    Engine(
        "sd_inpaint",
        "SD inpainting",
        "stable-diffusion-v1-5/stable-diffusion-inpainting",
        ("inpainting", "inpaint_", "-inpaint"),
        "hf download stable-diffusion-v1-5/stable-diffusion-inpainting",
    ),
    Engine(
        "glid",
        "glid-3-xl-stable",
        "",
        ("inpaint.pt", "glid"),
        "get inpaint.pt and kl.pt of https://github.com/Jack000/glid-3-xl-stable, then: diptych glid folder",
    ),
    Engine(
        "powerpaint",
        "PowerPaint v1",
        "JunhaoZhuang/PowerPaint-v1",
        ("powerpaint",),
        "hf download JunhaoZhuang/PowerPaint-v1, for ComfyUI then: diptych powerpaint split",
    ),
)


def engines(comfyuis: list[Path]) -> Iterator[Finding]:
    """Where full-size models and LoRAs lie: in the hub's cache and in ComfyUI's folders."""
    files = [path for comfyui in comfyuis for path in installed.model_files(comfyui, *MODELS)]
    for engine in ENGINES:
        folder = installed.cached_model(engine.hub) if engine.hub else None
        named = [path for path in files if any(word in path.name.lower() for word in engine.words)]
        what = f"{engine.title} ({engine.name})"
        if folder:
            yield Finding("ok", f"{what} for the command line: {folder}")
        if named:
            yield Finding("ok", f"{what} for ComfyUI: {', '.join(str(path) for path in named[:3])}")
        if not folder and not named:
            yield Finding("missing", f"{what} is not on this machine", engine.remedy)
    yield from loras(comfyuis)


def loras(comfyuis: list[Path]) -> Iterator[Finding]:
    """The LoRA files of ComfyUI, and whether ICEdit's is among them."""
    files = [path for comfyui in comfyuis for path in installed.model_files(comfyui, "loras")]
    if files:
        yield Finding("ok", f"{len(files)} LoRA file(s) for ComfyUI, e.g. {files[0].name}")
    if not any("icedit" in path.name.lower() for path in files):
        remedy = f"save https://huggingface.co/{ICEDIT_LORA}'s weights there as icedit_lora.safetensors"
        yield Finding("missing", "no ICEdit LoRA in ComfyUI's models/loras", remedy)


def tiny() -> Iterator[Finding]:
    """Whether the bundled tiny models are complete, and trained."""
    from ..models import tiny as bundled

    folder = bundled.folder()
    found = [name for name in TINY if any((folder / name).glob("*.json"))]
    if lost := ", ".join(name for name in TINY if name not in found):
        yield Finding(
            "missing", f"bundled tiny models ({lost}) are not in {folder}", "reinstall the whole pack"
        )
        return
    trained = bundled.card().get("trained")
    what = f"bundled tiny models: {', '.join(found)} ({'trained' if trained else 'untrained'})"
    yield Finding("ok", what, "" if trained else "their images are noise until they are trained")


def web() -> Iterator[Finding]:
    """Whether `diptych web` can be served."""
    try:
        version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("missing", "diptych web: gradio is not installed", missing.install("gradio"))
    else:
        yield Finding("ok", f"diptych web: gradio {version}")


def judges() -> Iterator[Finding]:
    """Which rewards can judge at once, and what the others would load first. Asks no network."""
    try:
        from ..training.rewards import at_hand, names
    except ImportError as error:
        yield Finding("missing", "judges", missing.sentence(error))
        return
    lacking = {name: reason for name in names() if (reason := at_hand(name))}
    yield Finding("ok", f"judges ready: {', '.join(name for name in names() if name not in lacking)}")
    for name, reason in lacking.items():
        yield Finding("missing", f"judge {name}", reason)
