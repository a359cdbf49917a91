"""`diptych glid`: glid-3-xl-stable's model files from Stable Diffusion checkpoints, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers) -> None:
    """Add `diptych glid` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "glid",
        help="glid-3-xl-stable's files: from a checkpoint, back into one, or as a diffusers folder",
        description="glid-3-xl-stable keeps the denoiser (diffusion.pt) and the autoencoder (kl.pt) of a "
        "Stable Diffusion 1.x checkpoint in files of their own. ComfyUI loads either; diptych outpaint and "
        "inpaint want a folder.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    split = actions.add_parser("split", help="checkpoint -> diffusion.pt and kl.pt")
    split.add_argument("checkpoint", type=Path, help=".ckpt or .safetensors")
    split.add_argument("-o", "--output", type=Path, default=Path("."), metavar="FOLDER", help="default: here")
    split.set_defaults(run=run_split)
    merge = actions.add_parser("merge", help="checkpoint and diffusion.pt -> checkpoint")
    merge.add_argument("checkpoint", type=Path, help="the one that the rest is taken from")
    merge.add_argument("model", type=Path, help="diffusion.pt or inpaint.pt")
    merge.add_argument(
        "-o", "--output", type=Path, default=Path("model-merged.pt"), help="default model-merged.pt"
    )
    merge.set_defaults(run=run_merge)
    folder = actions.add_parser("folder", help="inpaint.pt and kl.pt -> a folder for --engine glid --model")
    folder.add_argument("model", type=Path, help="inpaint.pt")
    folder.add_argument("autoencoder", type=Path, help="kl.pt")
    folder.add_argument("base", type=Path, help="a Stable Diffusion 1.x diffusers folder: its text encoder")
    folder.add_argument("-o", "--output", type=Path, default=Path("glid"), metavar="FOLDER")
    folder.set_defaults(run=run_folder)


def run_split(args: argparse.Namespace) -> dict[str, Any]:
    """Write diffusion.pt and kl.pt of a checkpoint. Raises ValueError if a part is not in it."""
    from ..models import checkpoints
    from ..training.runtime.disk import check_file, keep_whole

    targets = {"diffusion.pt": checkpoints.DENOISER, "kl.pt": checkpoints.AUTOENCODER}
    args.output.mkdir(parents=True, exist_ok=True)
    for name in targets:
        check_file(args.output / name)
    state = checkpoints.read(args.checkpoint)
    parts = {name: checkpoints.part(state, prefix) for name, prefix in targets.items()}
    made = []
    for name, tensors in parts.items():
        place = keep_whole(args.output / name, lambda path, tensors=tensors: checkpoints.write(path, tensors))
        print(f"wrote {place}: {len(tensors)} tensors")
        made.append(place)
    return {"files": made}


def run_merge(args: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint with another denoiser. Raises ValueError for an unknown suffix."""
    from ..models import checkpoints
    from ..training.runtime.disk import check_file, keep_whole

    if args.output.suffix.lower() not in checkpoints.SUFFIXES:
        raise ValueError(
            f"output {args.output} has an unknown suffix: give one of {', '.join(checkpoints.SUFFIXES)}"
        )
    check_file(args.output)
    state, model = checkpoints.read(args.checkpoint), checkpoints.read(args.model)
    merged = checkpoints.with_part(state, checkpoints.DENOISER, model)
    place = keep_whole(args.output, lambda path: checkpoints.write(path, merged, wrapped=True))
    print(f"wrote {place}")
    entry = merged.get(f"{checkpoints.DENOISER}input_blocks.0.0.weight")
    if entry is not None and entry.shape[1] != 4:
        print(f"its denoiser takes {entry.shape[1]} channels: loaders of ordinary checkpoints refuse it")
    return {"files": [place]}


def run_folder(args: argparse.Namespace) -> dict[str, Any]:
    """Write a diffusers folder of glid's own files. Raises ValueError for files that are not."""
    from ..models.glid import files
    from ..training.runtime.disk import check_folder

    folder = files.write_folder(args.model, args.autoencoder, args.base, check_folder(args.output))
    print(f"wrote {folder}")
    return {"folder": folder}
