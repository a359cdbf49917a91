"""`diptych powerpaint`: the task words of PowerPaint v1 as embeddings for ComfyUI."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers) -> None:
    """Add `diptych powerpaint` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "powerpaint",
        help="cut PowerPaint's task words out of its text encoder",
        description="PowerPaint v1 is Stable Diffusion inpainting with three learnt words, kept in its text "
        "encoder. As embeddings ComfyUI reads them: put them into models/embeddings, its unet.safetensors "
        "into models/diffusion_models.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    split = actions.add_parser("split", help="text_encoder.safetensors -> P_ctxt, P_shape, P_obj")
    split.add_argument("encoder", type=Path, help="PowerPaint v1's text_encoder.safetensors")
    split.add_argument("-o", "--output", type=Path, default=Path("."), metavar="FOLDER", help="default: here")
    split.add_argument(
        "--clip", type=Path, metavar="OUT.safetensors", help="write the text encoder without them, too"
    )
    split.set_defaults(run=run_split)


def run_split(args: argparse.Namespace) -> dict[str, Any]:
    """Write the three embeddings. Raises ValueError for a file that is not PowerPaint's."""
    from ..models import checkpoints, powerpaint
    from ..training.runtime.disk import check_file, keep_whole

    if args.clip is not None:
        if args.clip.suffix.lower() != ".safetensors":
            raise ValueError(f"--clip is {args.clip}: name a .safetensors file")
        check_file(args.clip, need=args.encoder.stat().st_size if args.encoder.is_file() else 0)
    tokens = powerpaint.task_tokens(args.encoder)
    args.output.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {"embeddings": [], "text_encoder": None}
    for token, vectors in tokens.items():
        target = check_file(args.output / f"{token}.safetensors")
        state = {powerpaint.KEY: vectors}
        place = keep_whole(target, lambda path, state=state: checkpoints.write(path, state))
        print(f"wrote {place}: {len(vectors)} vectors")
        made["embeddings"].append(place)
    if args.clip is not None:
        place = keep_whole(args.clip, lambda path: powerpaint.write_encoder(args.encoder, path))
        print(f"wrote {place}")
        made["text_encoder"] = place
    return made
