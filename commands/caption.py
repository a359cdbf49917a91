"""`diptych caption`: what an image shows, in words, by the multimodal model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from . import images, multimodal, progress
from .stopping import Stop
from .values import number, seed, whole

MOST = 256  # captions of an image


def add_parser(subparsers: Any) -> None:
    """Add `diptych caption` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "caption",
        help="say what an image shows (small multimodal model)",
        description="Caption images with a multimodal model (docs/multimodal.md), which sees their middle "
        "square and knows what it was trained on. One line per caption; of several images each begins with "
        "the file.",
    )
    add = parser.add_argument
    add("images", metavar="IMAGE", nargs="+", help="image files")
    multimodal.add_arguments(parser)
    add("--count", type=whole(1, MOST), default=1, help="captions of each image (default 1)")
    add(
        "--temperature",
        type=number(0),
        help="0 is the likeliest caption (default 0, 0.9 with --count above 1)",
    )
    add("--top-k", type=whole(0), default=50, help="likeliest tokens to draw among, 0 = all (default 50)")
    add("--top-p", type=number(1e-6, 1), default=0.9, help="share of likelihood to draw among (default 0.9)")
    add("--repetition-penalty", type=number(1e-6), help="1 is none (default 1, 1.3 where captions are drawn)")
    add("--seed", type=seed, default=42, help="of the draw (default 42)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the captions to the standard output. Raises ValueError or FileNotFoundError."""
    folder = multimodal.check_model(args)
    loaded = [images.load_image(path) for path in args.images]
    temperature = (0.0 if args.count == 1 else 0.9) if args.temperature is None else args.temperature
    penalty = (1.3 if temperature else 1.0) if args.repetition_penalty is None else args.repetition_penalty
    with Stop("stopped before all images were seen"):
        model = multimodal.load(folder, args)
        found = []
        for path, image in zip(args.images, progress.over(loaded, "reading", "image"), strict=True):
            (captions,) = model.generate_from_image(
                image, args.count, temperature, args.top_k, args.top_p, penalty, seed=args.seed
            )
            for caption in captions:
                sys.stdout.write(f"{path}: {caption}\n" if len(loaded) > 1 else f"{caption}\n")
            found.append({"image": path, "captions": list(captions)})
    return {"captions": found, "model": folder, "seed": args.seed}
