"""LoRAs on the command line: `--lora PATH[:STRENGTH]`, any number of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add --lora."""
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:STRENGTH]",
        help="LoRA file or folder, of any format; may be repeated",
    )


def read(text: str, strength: float = 1.0) -> tuple[Any, float]:
    """PATH or PATH:STRENGTH to the LoRA and its strength. Raises FileNotFoundError, LoraError."""
    from ..models.lora.files import exists, with_strength
    from ..models.lora.read import read as read_lora

    path, strength = with_strength(text, strength)
    if not exists(path):
        raise FileNotFoundError(
            f"LoRA {path} does not exist: give a file or folder, with :0.8 for a strength"
        )
    return read_lora(path), strength


def apply(module: Any, loras: Sequence[tuple[Any, float]]) -> list[Any]:
    """Put them on a diffusers module, in order; returns their handles, which follow sigma and can report.

    What a report says beyond the ordinary goes to stderr: parts left out, another base model.
    """
    from ..models.lora.diffusers import apply_to_diffusers

    handles = [apply_to_diffusers(module, weights, strength) for weights, strength in loras]
    for handle in handles:
        for line in (*handle.report.notes, *handle.report.left_out()):
            sys.stderr.write(f"{handle.report.name}: {line}\n")
    return handles


def follow(handles: Sequence[Any]) -> Callable[[float], None]:
    """What a sampler calls before each step, so that every LoRA keeps to its own sigma window."""

    def at_sigma(sigma: float) -> None:
        for handle in handles:
            handle.at_sigma(sigma)

    return at_sigma
