"""`diptych inpaint`: the white part of a mask painted anew, everything else exactly as it was."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import images, inpaint_options, painting
from .values import LARGEST_SIDE, number, whole


def add_parser(subparsers) -> None:
    """Add `diptych inpaint` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "inpaint",
        help="paint a part of an image anew",
        description="Paint the white part of a mask anew; everything else comes back bit for bit. Of a "
        "image larger than the model's size only the mask's surroundings go through the model. Without "
        "--model the bundled tiny model paints, which knows only small images of coloured shapes.",
    )
    add = parser.add_argument
    add("image", metavar="IMAGE", help="image to repair")
    add("prompt", metavar="PROMPT", help="what the image shows there")
    add("--mask", required=True, metavar="MASK", help="white is painted; of the image's size")
    add("--context", type=number(1), default=2.0, help="how many times the mask's size is seen (default 2)")
    add(
        "--size",
        type=whole(0, LARGEST_SIDE),
        help="px a side at which the model sees it, 0 for the image's own scale (default: as trained)",
    )
    add(
        "--blend",
        type=whole(0, 4096),
        default=8,
        help="px inside the mask over which it fades in (default 8)",
    )
    inpaint_options.add_arguments(parser)
    painting.add_arguments(parser, "inpainted.png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Repaint the masked part and write the image. Raises ValueError before a model is loaded."""
    engine = painting.check_engine(args)
    how, fill = inpaint_options.checked(args, engine), inpaint_options.prefill(args)
    prompt = args.prompt.strip()
    if args.task not in ("remove", "outpaint"):
        prompt = painting.check_prompt(prompt)
    image = images.load_image(args.image)
    images.check_writable(args.output, image)

    def paint(crop: Tensor, hole: Tensor) -> Tensor:
        if fill is not None:
            how["filled"] = fill(crop, hole)
        return painting.paint(engine, crop, hole, prompt, args, **how)

    finished = repaired(paint, image, images.load_mask(args.mask), engine, args)
    return painting.save(image, finished, prompt, args, engine)


def repaired(
    paint: Callable[[Tensor, Tensor], Tensor],
    image: Tensor,
    mask: Tensor,
    engine: painting.Engine,
    args: argparse.Namespace,
) -> Tensor:
    """The image [1,H,W,C], the white of a mask [1,H,W] as `paint` makes it of what the model sees of both.

    Everything else is the image's bit for bit. Raises ValueError for a mask that does not fit.
    """
    from ..models import outpaint

    size = engine.size if args.size is None else args.size
    large = max(image.shape[1:3]) > size
    crop, hole, layout = outpaint.crop_context(
        image,
        mask,
        context=args.context if large else LARGEST_SIDE,
        size=size if large else None,
        multiple=engine.multiple,
        blend=args.blend,
    )
    result = paint(crop, hole)
    return outpaint.paste_back(
        result, image, layout, feather=args.feather, match_colour=not args.keep_colours
    )
