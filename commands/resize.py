"""`diptych resize`: a LoRA of a smaller rank."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "resize",
        help="cut a LoRA to a smaller rank",
        description="Keep the leading singular directions of every module of a LoRA: a smaller file that "
        "changes the model almost alike. What it lost can be trained back (init_lora of train and grpo).",
    )
    parser.add_argument("lora", help="LoRA file or folder, of any format but MoE and LyCORIS")
    parser.add_argument("--rank", type=int, required=True, help="largest rank that is kept")
    parser.add_argument("-o", "--output", required=True, help="the .safetensors file to write")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..models.lora.resize import resize
    from ..models.lora.save import save
    from .loras import read

    made = resize(read(args.lora)[0], args.rank)
    path = save(args.output, made)
    sys.stdout.write(f"{made.notes[-1]}\n{path}\n")
    return 0
