"""`diptych merge-inpaint`: any Stable Diffusion finetune as an inpainting model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .progress import Bar

DTYPES = ("float16", "bfloat16", "float32")


def add_parser(subparsers) -> None:
    """Add `diptych merge-inpaint` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "merge-inpaint",
        help="make an inpainting model of a Stable Diffusion finetune",
        description="Add to a finetune what an inpainting checkpoint learnt over their common base: custom + "
        "inpaint - base. Text encoder and VAE stay the finetune's. Needs no GPU, and little memory.",
    )
    add = parser.add_argument
    add("custom", type=Path, metavar="CUSTOM", help="the finetune: .safetensors, .ckpt or .pt")
    add("--inpaint", type=Path, required=True, metavar="FILE", help="such as sd-v1-5-inpainting.safetensors")
    add("--base", type=Path, required=True, metavar="FILE", help="such as v1-5-pruned-emaonly.safetensors")
    add("-o", "--output", type=Path, metavar="OUT.safetensors", help="default CUSTOM-inpainting.safetensors")
    add("--dtype", choices=DTYPES, help="of the result (default: the finetune's)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the merged checkpoint. Raises ValueError if the three files do not fit together."""
    import torch

    from ..models import merge_inpaint
    from ..training.runtime.disk import check_file, keep_whole

    output = args.output or args.custom.with_name(f"{args.custom.stem}-inpainting.safetensors")
    if output.suffix.lower() != ".safetensors":
        raise ValueError(f"output {output} has another suffix: name a .safetensors file")
    for name in ("custom", "inpaint", "base"):
        path = getattr(args, name)
        if path.exists() and output.exists() and path.samefile(output):
            raise ValueError(f"output {output} is {name} itself: choose another name")
    check_file(output, need=args.custom.stat().st_size if args.custom.is_file() else 0)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    with Bar("merging", unit="tensor") as bar:

        def advance(index: int, count: int) -> None:
            bar.total = count
            bar.to(index + 1)

        place = keep_whole(
            output,
            lambda path: merge_inpaint.merge(
                args.custom, args.inpaint, args.base, path, dtype=dtype, on_tensor=advance
            ),
        )
    print(f"wrote {place}: nine input channels, for Load Checkpoint and SD Inpaint Conditioner")
    return {"checkpoint": place}
