"""`diptych outpaint`: an image made larger on any side, the known part exactly as it was."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from . import images, painting
from .values import LARGEST_SIDE, number, whole

METHODS = ("direct", "tiles")
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
        default="edge",
        help="what stands in the hole first: edge (default), mirror, blur, noise, ...",
    )
    add("--method", default="direct", choices=METHODS, help="the canvas at once (default), or by windows")
    add(
        "--window",
        type=whole(16, LARGEST_SIDE),
        help="for tiles: px a side (default: as the model was trained)",
    )
    add("--stride", type=whole(8, LARGEST_SIDE), help="for tiles: px from one to the next (default half)")
    add("--lama", type=Path, metavar="FILE", help="for --fill lama: its file, such as big-lama.pt")
    add("--noise-q", type=number(0, 4), help="for --fill noise: 0 rough to 2 smooth (default 1)")
    painting.add_arguments(parser, "outpainted.png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Enlarge and write the image; returns 0. Raises ValueError before a model is loaded."""
    from ..models import outpaint

    engine = painting.check_engine(args)
    prompt = painting.check_prompt(args.prompt)
    image = images.load_image(args.image)
    images.check_writable(args.output, image)
    canvas, mask, layout = outpaint.expand(
        image,
        **_sides(args, image.shape[1:3]),
        unit="aspect" if args.aspect else "px",
        multiple=engine.multiple,
        overlap=args.overlap,
    )
    if not bool(layout.mask.any()):
        raise ValueError("nothing is to be painted: add with --left, --top, --right, --bottom or --aspect")
    windows = _windows(args, engine, layout.canvas_size)
    canvas = outpaint.fill(canvas, mask, args.fill, **_fill_options(args))
    result = painting.paint(engine, canvas, mask, prompt, args, windows)
    finished = outpaint.paste_back(
        result, image, layout, feather=args.feather, match_colour=not args.keep_colours
    )
    painting.save(image, finished, prompt, args.output)
    return 0


def _sides(args: argparse.Namespace, size: tuple[int, int]) -> dict[str, float]:
    """The four amounts: pixels, or the aspect to reach on every side."""
    given = {side: getattr(args, side) for side in SIDES if getattr(args, side) is not None}
    if args.aspect:
        if given:
            raise ValueError(f"--{next(iter(given))} and --aspect are two ways to say it: give one")
        return dict.fromkeys(SIDES, args.aspect)
    lengths = dict(zip(SIDES, (size[1], size[0]) * 2, strict=True))
    pixels = dict.fromkeys(SIDES, 0)
    for side, (value, unit) in given.items():
        pixels[side] = math.floor(value * lengths[side] + 1e-9) if unit == "fraction" else int(value)
    return pixels


def _windows(args: argparse.Namespace, engine, canvas: tuple[int, int]) -> painting.Windows | None:
    """Checked before the model is loaded; None for the direct way."""
    for name in ("window", "stride"):
        value = getattr(args, name)
        if value is not None and args.method != "tiles":
            raise ValueError(f"--{name} is for --method tiles: leave it out")
        if value is not None and value % 16:
            raise ValueError(f"--{name} is {value}: give a multiple of 16")
    if args.method != "tiles":
        return None
    window = args.window or engine.size
    if window > max(canvas):
        raise ValueError(
            f"--window is {window} but the canvas is {canvas[1]} x {canvas[0]}: give at most {max(canvas)},"
            " or --method direct"
        )
    if args.stride is not None and args.stride > window:
        raise ValueError(f"--stride is {args.stride} and the window {window}: give at most the window")
    return painting.Windows(window, args.stride)


def _fill_options(args: argparse.Namespace) -> dict:
    options = {}
    for name, fill, option in (("lama", "lama", "model"), ("noise_q", "noise", "noise_q")):
        value = getattr(args, name)
        if value is not None:
            if args.fill != fill:
                raise ValueError(f"--{name.replace('_', '-')} is for --fill {fill}: leave it out")
            options[option] = value
    if args.fill in ("noise", "gaussian", "perlin"):
        options["seed"] = args.seed
    return options
