"""`diptych precompute`: images to Flux Fill embeddings and latents on disk, for reward training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .logs import speak
from .progress import over, quiet
from .recipe_options import add_set
from .stopping import Stop, Stopped


def add_parser(subparsers: Any) -> None:
    """Add `diptych precompute` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "precompute",
        help="encode images for FLUX Fill: what `precomputed:FOLDER/index.json` reads",
        description="Encode prompts, masked images and masks with the encoders of a FLUX Fill model: one "
        "file per row and kind of tensor, and an index.json. An interrupted run goes on where it was.",
    )
    add = parser.add_argument
    add(
        "data",
        nargs="+",
        metavar="KIND:LOCATION",
        help="data sources as in a recipe, for example pairs:FOLDER",
    )
    add("--model", required=True, metavar="DIR_OR_HUB_ID", help="FLUX Fill as diffusers folder or hub id")
    add("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where index.json and tensors go")
    add("--targets", action="store_true", help="the target images' latents too, for supervised training")
    add_set(
        parser,
        "recipe options that shape a row: resolution, sizing, layout, mask_kinds, mask_variants, "
        "max_sequence_length, cache_dtype, seed, ...",
        _kind,
    )
    parser.set_defaults(run=run)


def _kind() -> type:
    from ..training.config import TrainConfig

    return TrainConfig


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Encode the rows and print where the index is. Raises `Stopped` after a signal."""
    from ..training import recipes

    speak()
    quiet()
    values = recipes.overridden({"task": "fill"}, args.set)
    config = recipes.from_dict({**values, "model": args.model, "data": args.data})
    from ..training.precompute import precompute

    more = "the same command goes on from here"
    with Stop(f"stopped: {more}", f"stopping after this batch, {more}") as stop:
        index = precompute(config, args.output, targets=args.targets, progress=over, should_stop=stop.asked)
    if stop.signal:
        raise Stopped(stop.signal, f"{index} lists what is encoded so far; {more}", index=index)
    sys.stdout.write(f"{index}\n")
    return {"index": index}
