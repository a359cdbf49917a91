"""`diptych resize`: a LoRA of a smaller rank."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .stopping import Stop
from .values import positive


def add_parser(subparsers: Any) -> None:
    """Add `diptych resize` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "resize",
        help="cut a LoRA to a smaller rank",
        description="Keep the leading singular directions of every module of a LoRA: a smaller file that "
        "changes the model almost alike. What it lost can be trained back (init_lora of train and grpo).",
    )
    parser.add_argument("lora", help="LoRA file or folder, of plain factors: not MoE, LyCORIS, DoRA or OFT")
    parser.add_argument("--rank", type=positive, required=True, help="largest rank that is kept")
    parser.add_argument("-o", "--output", required=True, help="the .safetensors file to write")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the smaller LoRA. Raises ValueError for an output that is no .safetensors file."""
    from ..models.lora.resize import resize
    from ..models.lora.save import save
    from ..training.runtime.disk import check_file, keep
    from .loras import read

    output = Path(args.output)
    if output.suffix.lower() != ".safetensors":
        raise ValueError(f"output {output} has no suffix .safetensors, by which a LoRA is known: add it")
    check_file(output)
    weights = read(args.lora)[0]
    with Stop("stopped before the LoRA was resized: nothing was written"):
        made = resize(weights, args.rank)
    path = keep(output, lambda place: save(place, made))
    sys.stdout.write(f"{made.notes[-1]}\n{path}\n")
    return {"lora": path, "note": made.notes[-1]}
