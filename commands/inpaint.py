"""`diptych inpaint`: the white part of a mask painted anew, everything else exactly as it was."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..models.inpaint_masks import MASK_RESIZE
from ..models.powerpaint import TASKS
from . import images, painting
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
    add(
        "--strength",
        type=number(0.01, 1),
        help="sd_inpaint: below 1 what is there is changed, not replaced (default 1)",
    )
    add(
        "--mask-resize",
        choices=MASK_RESIZE,
        help="sd_inpaint: which cells of 8 x 8 px are repainted: touched at all (max, default), by their "
        "first pixel (nearest, as diffusers), their middle, their mean",
    )
    add(
        "--powerpaint",
        type=Path,
        metavar="FOLDER",
        help="sd_inpaint: PowerPaint v1 (unet/ and text_encoder/) in the place of the model's own weights",
    )
    add("--task", choices=TASKS, help="for --powerpaint: what to do with the masked part (default text)")
    add("--fitting", type=number(0, 1), help="for --task shape: how closely it fills the mask (default 1)")
    painting.add_arguments(parser, "inpainted.png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Repaint the masked part and write the image; returns 0. Raises ValueError before a model is loaded."""
    from ..models import outpaint

    engine = painting.check_engine(args)
    how = _sd_options(args, engine)
    prompt = args.prompt.strip()
    if args.task not in ("remove", "outpaint"):
        prompt = painting.check_prompt(prompt)
    image = images.load_image(args.image)
    images.check_writable(args.output, image)
    size = engine.size if args.size is None else args.size
    crop, mask, layout = outpaint.crop_context(
        image,
        images.load_mask(args.mask),
        context=args.context if max(image.shape[1:3]) > size else LARGEST_SIDE,
        size=size if max(image.shape[1:3]) > size else None,
        multiple=engine.multiple,
        blend=args.blend,
    )
    result = painting.paint(engine, crop, mask, prompt, args, **how)
    finished = outpaint.paste_back(
        result, image, layout, feather=args.feather, match_colour=not args.keep_colours
    )
    painting.save(image, finished, prompt, args.output)
    return 0


def _sd_options(args: argparse.Namespace, engine: painting.Engine) -> dict[str, Any]:
    """Options of `editing.inpaint_sd` that FLUX Fill has not. Raises ValueError for them with Fill."""
    from ..models.inpaint_masks import MaskRule

    for option, needed in (("task", "powerpaint"), ("fitting", "task")):
        if getattr(args, option) is not None and getattr(args, needed) is None:
            raise ValueError(f"--{option} needs --{needed}: give that too, or leave it out")
    if engine.name != "sd_inpaint":
        for option in ("strength", "mask_resize", "powerpaint", "task", "fitting"):
            if getattr(args, option) is not None:
                name = option.replace("_", "-")
                raise ValueError(f"--{name} does nothing with --engine {engine.name}: leave it out")
        return {}
    how = {"strength": args.strength or 1.0, "rule": MaskRule(args.mask_resize or "max")}
    return how | ({} if args.powerpaint is None else {"words": _task_words(args)})


def _task_words(args: argparse.Namespace) -> Callable[[Any], tuple]:
    """What makes PowerPaint of a loaded model and encodes its prompts. Raises ValueError or FileNotFoundError
    for a folder that lacks a file."""
    from ..models import powerpaint

    for name in (powerpaint.UNET, powerpaint.ENCODER):
        if not (args.powerpaint / name).is_file():
            raise FileNotFoundError(
                f"--powerpaint {args.powerpaint} has no {name}: give PowerPaint v1's folder"
            )
    fitting = 1.0 if args.fitting is None else args.fitting

    def words(denoiser: Any) -> tuple:
        powerpaint.load_onto(denoiser, args.powerpaint)
        return powerpaint.encode(denoiser, args.task or "text", args.prompt.strip(), args.negative, fitting)

    return words
