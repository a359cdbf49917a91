"""`diptych outpaint`: an image made larger on any side, the known part exactly as it was."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from . import images, painting
from .values import LARGEST_SIDE, number, whole

METHODS = ("direct", "tiles", "mk2", "poor-man", "mosaic")
USERS = {  # option -> the methods that it is for
    "window": ("tiles", "mk2", "poor-man"),
    "stride": ("tiles",),
    "order": ("tiles",),
    "mask_blur": ("mk2", "poor-man"),
    "overlap": ("direct", "tiles", "mosaic"),
    "feather": ("direct", "tiles", "mosaic"),
    "fill": ("direct", "tiles", "poor-man"),
    "denoise": ("direct", "mk2", "poor-man", "mosaic"),
}
DENOISE = {"mk2": 0.8, "mosaic": 0.9}  # as their authors advise
SIDES = ("left", "top", "right", "bottom")


def amount(text: str) -> tuple[float, str]:
    """`256` or `50%`: (number, unit), a percentage as a fraction of the image's own side.

    Raises ArgumentTypeError for anything else.
    """
    word = text.strip()
    try:
        value = float(word.rstrip("%"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (not word.endswith("%") and value != int(value)):
        raise argparse.ArgumentTypeError(f"it is {text!r}: give whole pixels, such as 256, or 50%")
    return (value / 100, "fraction") if word.endswith("%") else (value, "px")


def aspect(text: str) -> float:
    """Width over height, from `16:9` or `1.78`. Raises ArgumentTypeError for anything else."""
    width, colon, height = text.partition(":")
    try:
        value = float(width) / float(height if colon else 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 < value < 1000:
        raise argparse.ArgumentTypeError(f"it is {text!r}: give width:height, such as 16:9")
    return value


def add_parser(subparsers) -> None:
    """Add `diptych outpaint` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "outpaint",
        help="make an image larger, painting what is around it",
        description="Make an image larger on any side; what is known comes back bit for bit. Amounts are "
        "pixels or, with %, parts of the image's own side; below 0 they crop (--left=-32). Without "
        "--model the bundled tiny model paints, which knows only small images of coloured shapes.",
    )
    add = parser.add_argument
    add("image", metavar="IMAGE", help="image to enlarge")
    add("prompt", metavar="PROMPT", help="what the whole finished image shows")
    for side in SIDES:
        add(f"--{side}", type=amount, metavar="PX_OR_%", help=f"how much to add on the {side}")
    add("--aspect", type=aspect, metavar="W:H", help="instead: grow evenly until the image has this aspect")
    add("--overlap", type=whole(0, 4096), default=0, help="px of the image's edge to repaint as well")
    add(
        "--fill",
        help="what stands in the hole first: edge (default), mirror, blur (default of poor-man), noise, ...",
    )
    add(
        "--method",
        default="direct",
        choices=METHODS,
        help="the canvas at once (default), by windows, or as webui's Outpainting mk2, Poor man's "
        "outpainting and Mosaic outpaint",
    )
    add(
        "--window",
        type=whole(16, LARGEST_SIDE),
        help="for tiles, mk2 and poor-man: px a side (default: as the model was trained)",
    )
    add("--stride", type=whole(8, LARGEST_SIDE), help="for tiles: px from one to the next (default half)")
    add(
        "--order",
        choices=("outward", "glid"),
        help="for tiles: from the image outwards (default), or glid-3-xl-stable's, row by row over the hole",
    )
    add(
        "--denoise",
        type=number(0.01, 1),
        help="below 1 the model starts from the fill (default 1, mk2 0.8, mosaic 0.9)",
    )
    add("--mask-blur", type=whole(0, 256), help="for mk2 and poor-man: px (default theirs, 8 and 4)")
    add("--lama", type=Path, metavar="FILE", help="for --fill lama: its file, such as big-lama.pt")
    add("--noise-q", type=number(0, 4), help="for --fill noise: 0 rough to 2 smooth (default 1)")
    painting.add_arguments(parser, "outpainted.png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Enlarge and write the image. Raises ValueError before a model is loaded."""
    from ..models import outpaint

    engine = painting.check_engine(args)
    prompt = painting.check_prompt(args.prompt)
    image = images.load_image(args.image)
    images.check_writable(args.output, image)
    if engine.name == "sd" and args.method == "tiles":
        raise ValueError("--engine sd knows no mask: use another --method than tiles, or another engine")
    method, options = args.method.replace("-", " "), options_of(args, engine)
    sides = sides_of(args, image.shape[1:3])

    def enlarge(paint) -> Tensor:
        return outpaint.outpaint(paint, image, sides, method, options)

    enlarge(rehearse(args))
    finished = painting.work(engine, prompt, args, enlarge, args.denoise or DENOISE.get(method, 1.0))
    return painting.save(image, finished, prompt, args, engine)


def rehearse(args: argparse.Namespace):
    """A painter that paints nothing: whatever is wrong with the image or the amounts is said before the
    model is loaded."""

    def paint(piece) -> Tensor:
        height, width = piece.image.shape[1:3]
        if piece.window is not None and piece.window > max(height, width):
            raise ValueError(
                f"--window is {piece.window} but the canvas is {width} x {height}: give at most"
                f" {max(height, width)}, or --method direct"
            )
        return piece.image

    return paint


def options_of(args: argparse.Namespace, engine):
    """The method's options. Raises ValueError for one that it does not have."""
    from ..models.outpaint import AUTO, Options

    for name, methods in USERS.items():
        if getattr(args, name) not in (None, 0) and args.method not in methods:
            raise ValueError(f"--{name.replace('_', '-')} is for --method {', '.join(methods)}: leave it out")
    window = args.window or engine.size
    for name, value in (("window", window), ("stride", args.stride or 0)):
        if value % 16:
            raise ValueError(f"--{name} is {value}: give a multiple of 16")
    if args.stride is not None and args.stride > window:
        raise ValueError(f"--stride is {args.stride} and the window {window}: give at most the window")
    return Options(
        window=window,
        stride=args.stride,
        order=args.order or "outward",
        fill=args.fill or AUTO,
        mask_blur=args.mask_blur,
        overlap=args.overlap,
        feather=args.feather,
        match_colour=not args.keep_colours,
        multiple=engine.multiple,
        seed=args.seed,
        **_fill_options(args),
    )


def sides_of(args: argparse.Namespace, size: tuple[int, int]) -> dict[str, int]:
    """The four amounts in pixels."""
    from ..models.outpaint.amounts import in_pixels

    given = {side: getattr(args, side) for side in SIDES if getattr(args, side) is not None}
    if args.aspect:
        if given:
            raise ValueError(f"--{next(iter(given))} and --aspect are two ways to say it: give one")
        return in_pixels(dict.fromkeys(SIDES, args.aspect), "aspect", size)
    lengths = dict(zip(SIDES, (size[1], size[0]) * 2, strict=True))
    pixels = dict.fromkeys(SIDES, 0)
    for side, (value, unit) in given.items():
        pixels[side] = math.floor(value * lengths[side] + 1e-9) if unit == "fraction" else int(value)
    return pixels


def _fill_options(args: argparse.Namespace) -> dict:
    if args.lama is not None and args.fill != "lama":
        raise ValueError("--lama is for --fill lama: leave it out")
    if args.noise_q is not None and args.fill != "noise" and args.method != "mk2":
        raise ValueError("--noise-q is for --fill noise and --method mk2: leave it out")
    options = {} if args.noise_q is None else {"noise_q": args.noise_q}
    return options | ({} if args.lama is None else {"fill_options": {"model": args.lama}})
