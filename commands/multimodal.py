"""What `diptych generate` and `diptych caption` share: which multimodal model, and how it is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .progress import quiet
from .values import check_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model and --device."""
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="what `diptych train multimodal` wrote (default: the bundled tiny one, of coloured shapes)",
    )
    add("--device", help="cuda, mps or cpu (default: cpu for the tiny model, else the best there is)")


def check_model(args: argparse.Namespace) -> Path:
    """The model's folder. Raises ValueError or FileNotFoundError if it is none, before anything is loaded."""
    from ..models.multimodal.storage import bundled, read_architecture

    check_device(args.device)
    folder = args.model or bundled()
    read_architecture(folder)
    return folder


def load(folder: Path, args: argparse.Namespace) -> Any:
    """The model in float32, in eval mode."""
    from ..models.flux import default_device
    from ..models.multimodal import GenerativeMultimodalModel

    quiet()
    model = GenerativeMultimodalModel.from_pretrained(folder)
    small = model.architecture.image_size < 100  # too small for a GPU to be faster
    return model.to(args.device or ("cpu" if small else default_device()))
