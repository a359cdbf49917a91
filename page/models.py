"""Which models and LoRAs the page offers, and the one that is loaded.

The page sends names; only names of these lists are ever looked up, so it cannot reach any other file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..commands import edit, painting
from ..models.lora.files import SUFFIXES

NAMES = {
    "fill": "FLUX Fill",
    "kontext": "FLUX Kontext",
    "sd_inpaint": "SD inpainting",
    "glid": "glid",
    "sd": "Stable Diffusion",
    "multimodal": "Multimodal",
}
EDIT = ("fill", "kontext")
PAINT = ("fill", "sd_inpaint", "glid", "sd")
WORDS = ("multimodal",)
AS_TRAINED, NO_LORA = "as the model needs", "none"


class Model(NamedTuple):
    """A model on offer: `source` is a diffusers folder or hub id, None the bundled tiny one."""

    engine: str
    source: str | None

    @property
    def label(self) -> str:
        """How menus name it."""
        name = "tiny" if self.source is None else Path(self.source).name or self.source
        return f"{NAMES[self.engine]}: {name}"


def engine_of(source: str) -> str:
    """The engine of a folder or hub id, by its files or its name. Raises ValueError for a folder of none."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            config = {}
        if isinstance(config, dict) and "architecture" in config:
            return "multimodal"
        raise ValueError(
            f"--model {source} is no model folder: it has neither model_index.json nor config.json"
        )
    if not folder.is_dir() and (folder.is_absolute() or source.startswith((".", "~"))):
        raise FileNotFoundError(f"--model {source} does not exist: check the path")
    painter = painting.engine_of(source)
    return edit.engine_of(source) if painter == "fill" else painter


class Offer:
    """The menus: models by engine, the given before the tiny ones, and LoRAs by name."""

    def __init__(self, sources: Sequence[str] = (), loras: Path | None = None):
        """sources: diffusers folders or hub ids. loras: a folder of LoRA files.

        Raises ValueError or FileNotFoundError for one that is none.
        """
        from ..models import tiny

        self.models = [Model(engine_of(source), source) for source in sources]
        self.models += [Model(name, None) for name in NAMES if (tiny.folder() / name).is_dir()]
        if len({model.label for model in self.models}) < len(self.models):
            raise ValueError("--model names two models that would have one name: rename a folder")
        if loras is not None and not loras.is_dir():
            raise FileNotFoundError(f"--loras {loras} is no folder: give one with LoRA files")
        self._loras = {} if loras is None else lora_files(loras)
        self._tiny_loras = lora_files(tiny.folder() / "loras")

    def labels(self, engines: Sequence[str]) -> list[str]:
        """The menu of models of these engines."""
        return [model.label for model in self.models if model.engine in engines]

    def model(self, label: Any, engines: Sequence[str]) -> Model:
        """The model of a menu's line. Raises ValueError for anything else."""
        for model in self.models:
            if model.label == label and model.engine in engines:
                return model
        there = ", ".join(self.labels(engines))
        if not there:
            raise ValueError("no model is here for this: start the page with --model FOLDER")
        raise ValueError(f"model is {label!r}: choose one of {there}")

    def lora_names(self, model: Model) -> list[str]:
        """The menu of LoRAs for a model; those of the tiny models are for the tiny models."""
        return [AS_TRAINED, NO_LORA, *(self._tiny_loras if model.source is None else {}), *self._loras]

    def lora(self, name: Any, model: Model) -> Path | None:
        """The file of a menu's line, None for the first two. Raises ValueError for anything else."""
        if name not in self.lora_names(model):
            raise ValueError(f"LoRA is {name!r}: choose one of {', '.join(self.lora_names(model))}")
        return self._loras.get(name) or self._tiny_loras.get(name)


def lora_files(folder: Path) -> dict[str, Path]:
    """LoRA files below a folder, by their path within it."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return {path.relative_to(folder).as_posix(): path for path in found}


class Loaded:
    """The model that was loaded last; tiny ones stay, of the others there is one at a time."""

    def __init__(self):
        self._kept: dict[Model, Any] = {}

    def get(self, model: Model, load: Callable[[], Any]) -> Any:
        """It, loaded if it is not there."""
        if model not in self._kept:
            if model.source is not None:
                self._kept = {other: made for other, made in self._kept.items() if other.source is None}
            self._kept[model] = load()
        return self._kept[model]
