"""What `diptych inpaint` offers beyond FLUX Fill: Stable Diffusion's own options, PowerPaint, ControlNet.

Each option belongs to some engines; one that an engine has not is an error, before a model is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.inpaint_masks import MASK_RESIZE
from ..models.powerpaint import TASKS
from .values import number

if TYPE_CHECKING:
    from .painting import Engine

OWN = {  # option: the engines that have it
    "strength": ("sd_inpaint", "sd"),
    "mask_resize": ("sd_inpaint", "sd"),
    "powerpaint": ("sd_inpaint",),
    "task": ("sd_inpaint",),
    "fitting": ("sd_inpaint",),
    "controlnet": ("sd",),
    "control_scale": ("sd",),
    "prefill": ("sd",),
    "lama": ("sd",),
}
NEEDS = {"task": "powerpaint", "fitting": "task", "control_scale": "controlnet", "lama": "prefill"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add(
        "--strength",
        type=number(0.01, 1),
        help="sd_inpaint, sd: below 1 what is there is changed, not replaced (default 1)",
    )
    add(
        "--mask-resize",
        choices=MASK_RESIZE,
        help="sd_inpaint, sd: which cells of 8 x 8 px are repainted: touched at all (max, default), by their "
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
    add("--controlnet", metavar="DIR_OR_HUB_ID", help="sd: such as lllyasviel/control_v11p_sd15_inpaint")
    add("--control-scale", type=number(0, 10), help="of the ControlNet (default 1)")
    add("--prefill", metavar="FILL", help="sd: what stands in the hole at the start: lama, blur, edge, ...")
    add("--lama", type=Path, metavar="FILE", help="for --prefill lama: its file, such as big-lama.pt")


def checked(args: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    """What `painting.paint` is given for them. Raises ValueError or FileNotFoundError in one sentence."""
    for option, engines in OWN.items():
        name = option.replace("_", "-")
        if getattr(args, option) is None:
            continue
        if engine.name not in engines:
            raise ValueError(f"--{name} does nothing with --engine {engine.name}: leave it out")
        needed = NEEDS.get(option)
        if needed and getattr(args, needed) is None:
            raise ValueError(f"--{name} needs --{needed}: give that too, or leave it out")
    if engine.name not in ("sd_inpaint", "sd"):
        return {}
    how: dict[str, Any] = {"strength": args.strength or 1.0}
    if engine.name == "sd":
        scale = {} if args.control_scale is None else {"scale": args.control_scale}
        return how | scale | ({"mask_resize": args.mask_resize} if args.mask_resize else {})
    from ..models.inpaint_masks import MaskRule

    how["rule"] = MaskRule(args.mask_resize or "max")
    return how | ({} if args.powerpaint is None else {"words": _task_words(args)})


def prefill(args: argparse.Namespace) -> Callable | None:
    """What fills the hole of an image and a mask before sampling; None to leave it. Raises ValueError."""
    if args.prefill is None:
        return None
    from ..models import outpaint
    from ..models.geometry import check_choice

    check_choice("--prefill", args.prefill, outpaint.FILLS)
    options = {} if args.lama is None else {"model": args.lama}
    if args.prefill == "lama" and (args.lama is None or not args.lama.is_file()):
        raise ValueError(f"--lama is {args.lama}: give LaMa's file, such as big-lama.pt")
    return lambda image, mask: outpaint.fill(image, mask, args.prefill, **options)


def _task_words(args: argparse.Namespace) -> Callable[[Any], tuple]:
    """What makes PowerPaint of a loaded model and encodes its prompts."""
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
