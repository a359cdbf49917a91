"""The folder of a multimodal model: config.json, model.safetensors, its tokenizers.

tokenizer/ is the text encoder's, caption_tokenizer/ the text decoder's if it differs. safetensors only;
checkpoints of the system's first design are told apart and refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import tiny
from .presets import Architecture

FORMAT = "diptych-multimodal"
VERSION = 1
TIED = "text_decoder.gpt2.lm_head.weight"  # GPT-2's output layer is its word table


def bundled() -> Path:
    """The folder of the tiny model that comes with the pack. Raises ValueError where it was left out."""
    folder = tiny.folder() / "multimodal"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"the tiny multimodal model is missing from {folder.parent}: reinstall the whole pack"
        )
    return folder


def refuse_old_design(keys: Iterable[str], name: str) -> None:
    """Raises ValueError if these are the keys of the first design, whose diffusion worked on embeddings."""
    old = next((key for key in keys if key.removeprefix("module.").startswith("diffusion.")), None)
    if old is not None:
        raise ValueError(
            f"{name} holds {old}: it is of the old design, whose diffusion ran on embeddings and never "
            "saw the text; nothing of that fits latent_diffusion, so train the model again"
        )


def save(
    folder: str | Path,
    state: Mapping[str, Tensor],
    architecture: Architecture,
    tokenizer: Any,
    caption_tokenizer: Any,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes the folder (weights in `dtype`, by default as they are) and returns it."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.to(dtype or value.dtype) for key, value in state.items() if key != TIED}
    content = {"format": FORMAT, "version": VERSION, "architecture": architecture.to_dict()}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _save_tokenizer(tokenizer, folder / "tokenizer")
    if caption_tokenizer is not tokenizer:
        _save_tokenizer(caption_tokenizer, folder / "caption_tokenizer")
    weights = {key: value.contiguous() for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Without the padding of its last call, so that equal models are equal files.

    transformers 5 gives its general tokenizer class a name that transformers 4 does not know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_architecture(folder: Path) -> Architecture:
    """Raises FileNotFoundError or ValueError, with what to give instead."""
    if folder.is_file() or (folder.is_dir() and not (folder / "config.json").is_file()):
        _refuse_other_files(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} does not exist: give a folder that save_pretrained wrote")
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise ValueError(
            f"{path} says format {content.get('format')!r}, version {content.get('version')!r} where "
            f"{FORMAT!r}, {VERSION} is expected: give a folder that save_pretrained wrote"
        )
    return Architecture.from_dict(content["architecture"])


def _refuse_other_files(path: Path) -> None:
    """Says what is wrong with a checkpoint that is no folder of ours."""
    suffixes = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        if file.suffix in suffixes:
            refuse_old_design(_keys(file), str(file))
    raise ValueError(f"{path} has no config.json: give a folder that save_pretrained wrote")


def _keys(file: Path) -> list[str]:
    """Names of the tensors in a checkpoint, also if it nests them; nothing is unpickled but tensors."""
    from safetensors import safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return list(tensors.keys())
        content = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as a file of tensors ({type(error).__name__}): "
            "give a folder that save_pretrained wrote"
        ) from error
    if not isinstance(content, dict):
        return []
    nested = [key for value in content.values() if isinstance(value, dict) for key in value]
    return [key for key in (*content, *nested) if isinstance(key, str)]


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fills every parameter and buffer from the folder. Raises ValueError if some are missing or left."""
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors: copy the whole folder")
    try:
        tensors = load_file(path)
    except Exception as error:  # half a download: safetensors has an error of its own for each way
        raise ValueError(f"{path} cannot be read ({error}): copy the whole folder") from error
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    wrong = sorted({*missing} - {TIED}) + sorted(unexpected)
    if wrong:
        raise ValueError(
            f"{path} and config.json disagree on {len(wrong)} tensors ({wrong[0]}, ...): "
            "copy the whole folder"
        )


def load_tokenizers(folder: Path) -> tuple[Any, Any]:
    """(text encoder's, text decoder's), one object if the folder has one.

    Raises FileNotFoundError without one.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(f"{folder} has no tokenizer folder: copy the whole folder")
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    own = folder / "caption_tokenizer"
    return tokenizer, AutoTokenizer.from_pretrained(str(own)) if own.is_dir() else tokenizer
