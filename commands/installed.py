"""What is on this machine: ComfyUI, model folders and LoRA files. Looks, reads versions, changes nothing.

Standard library only, so that `diptych doctor` can speak when everything else is missing.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
WEIGHTS = (".safetensors", ".gguf", ".sft", ".pt", ".pth", ".bin")


def comfyui_folders() -> list[Path]:
    """COMFYUI_PATH's folders; else the ComfyUI this pack is installed in; else comfy-cli's workspace."""
    named = [Path(path).expanduser() for path in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if path]
    if not named:
        around = [PACK.parent.parent] if PACK.parent.name == "custom_nodes" else []
        named = next(([path] for path in [*around, *_comfy_cli_workspaces()] if is_comfyui(path)), [])
    return [path.resolve() for path in named]


def all_comfyui_folders() -> list[Path]:
    """Every one of them: COMFYUI_PATH's, the one around this pack, comfy-cli's workspaces."""
    around = [PACK.parent.parent] if PACK.parent.name == "custom_nodes" else []
    others = [path.resolve() for path in [*around, *_comfy_cli_workspaces()] if is_comfyui(path)]
    return list(dict.fromkeys([*comfyui_folders(), *others]))


def _comfy_cli_workspaces() -> list[Path]:
    home = Path.home()
    places = (home / ".config", home / "Library/Application Support", home / "AppData/Local")
    config = configparser.ConfigParser()
    try:
        config.read([place / "comfy-cli" / "config.ini" for place in places], encoding="utf-8")
    except configparser.Error:
        config = configparser.ConfigParser()
    names = [config["DEFAULT"].get(key) for key in ("default_workspace", "recent_workspace")]
    return [Path(name) for name in names if name] + [home / "comfy" / "ComfyUI"]


def is_comfyui(path: Path) -> bool:
    """Whether a folder is one of ComfyUI's source."""
    return (path / "comfy" / "sd.py").is_file() and (path / "main.py").is_file()


def comfyui_version(comfyui: Path) -> str:
    """The version a ComfyUI folder says it is, "" if it says none."""
    path = comfyui / "comfyui_version.py"
    found = re.search(r'"([\d.]+)"', path.read_text(encoding="utf-8")) if path.is_file() else None
    return found.group(1) if found else ""


def holds_pack(comfyui: Path) -> bool:
    """Whether this pack is in a ComfyUI's custom_nodes, itself or by a link."""
    nodes = comfyui / "custom_nodes"
    return nodes.is_dir() and any(entry.resolve() == PACK for entry in nodes.iterdir())


def hub_cache() -> Path:
    """Where huggingface_hub keeps downloads."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"])
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(home) / "hub"


def cached_model(hub_id: str) -> Path | None:
    """The newest complete-looking snapshot of a diffusers model in the hub cache, None without one."""
    # Not huggingface_hub.snapshot_download(local_files_only=True): the doctor speaks when that is missing.
    snapshots = hub_cache() / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    found = sorted(snapshots.glob("*/model_index.json"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def model_files(comfyui: Path, *kinds: str) -> Iterator[Path]:
    """Weight files below ComfyUI's `models/<kind>` folders, and those of its extra_model_paths.yaml."""
    for kind in kinds:
        for folder in [comfyui / "models" / kind, *_extra_folders(comfyui, kind)]:
            if folder.is_dir():
                yield from sorted(p for p in folder.rglob("*") if p.suffix.lower() in WEIGHTS and p.is_file())


def _extra_folders(comfyui: Path, kind: str) -> list[Path]:
    """What extra_model_paths.yaml names for a kind; nothing where it, or the reader of YAML, is not there."""
    file = comfyui / "extra_model_paths.yaml"
    try:
        import yaml
    except ImportError:
        return []
    try:
        groups = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    found = []
    for group in groups.values() if isinstance(groups, dict) else ():
        base = comfyui / str(group.get("base_path", "")) if isinstance(group, dict) else comfyui
        lines = str(group.get(kind) or "").splitlines() if isinstance(group, dict) else []
        found += [(base / line.strip()).expanduser() for line in lines if line.strip()]
    return found


def nvidia_gpu() -> bool:
    """Whether NVIDIA's driver is on this machine, whatever torch can use."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
