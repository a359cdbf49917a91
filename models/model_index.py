"""What a diffusers folder's model_index.json may name: classes of diffusers and transformers, nothing else.

diffusers imports any installed module that the file names, and runs a .py file of that name in the folder.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIBRARIES = ("diffusers", "transformers")


def check(index: Mapping[str, Any], where: str, folder: Path | None = None) -> None:
    """Raise ValueError if the index of model `where` names code of its own or of another library.

    folder: where the model lies, if on disk.
    """
    if not isinstance(index.get("_class_name", ""), str):
        raise ValueError(f"model {where} brings a pipeline of its own: its code is not run")
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, (list, tuple)) or not entry or entry[0] is None:
            continue
        library = entry[0]
        if not isinstance(library, str) or (library not in LIBRARIES and not _is_pipeline(library)):
            raise ValueError(
                f"model {where} names {library!r} for its {name}: only classes of diffusers and transformers "
                "are loaded, download the model from its makers"
            )
        if folder is not None and (folder / name / f"{library}.py").exists():
            raise ValueError(f"model {where} brings {name}/{library}.py: remove it, its code is not run")


def _is_pipeline(library: str) -> bool:
    """Whether it is a part of diffusers (the safety checker of Stable Diffusion is named so)."""
    from diffusers import pipelines

    return library.isidentifier() and hasattr(pipelines, library)


def part_class(index: Mapping[str, Any], name: str, where: str) -> type:
    """The class of one part (vae, text_encoder, ...). Raises ValueError if there is none, or none allowed."""
    entry = index.get(name)
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or entry[0] is None:
        raise ValueError(f"model {where} has no {name}: pass a complete diffusers folder or hub id")
    library, kind = entry
    found = getattr(importlib.import_module(library), str(kind), None) if library in LIBRARIES else None
    if not isinstance(found, type) or not issubclass(found, _parts()):
        raise ValueError(
            f"model {where} names {library}.{kind} for its {name}: only models, schedulers and tokenizers of "
            "diffusers and transformers are loaded"
        )
    return found


def _parts() -> tuple[type, ...]:
    from diffusers import ModelMixin, SchedulerMixin
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    return ModelMixin, SchedulerMixin, PreTrainedModel, PreTrainedTokenizerBase
