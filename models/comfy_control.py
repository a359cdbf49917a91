"""A ControlNet of ComfyUI's loader told of a hole, through core's own node.

Imported at run time only, from a node.
"""

from __future__ import annotations

from typing import Any

import torch

import nodes as core

from . import control_inpaint
from .control_inpaint import ControlInput


def applied(
    positive: list,
    negative: list,
    control_net: Any,
    vae: Any,
    given: ControlInput,
    strength: float,
    start: float,
    end: float,
) -> tuple[list, list]:
    """Both conditionings with the ControlNet added, its range in 0..1 of the schedule.

    One that takes a mask beside the image (AliMama's for FLUX; core sets `concat_mask`) sees black under the
    mask and the mask of what is known; any other sees `control_inpaint.hint`.
    """
    known = 1 - given.mask
    if getattr(control_net, "concat_mask", False):
        image, beside = given.image * known[..., None], [known[:, None]]
    else:
        image, beside = control_inpaint.hint(given.image, given.mask), []
    made = core.ControlNetApplyAdvanced().apply_controlnet(
        positive, negative, control_net, image, strength, start, end, vae=vae, extra_concat=beside
    )
    return made[0], made[1]


def latent(vae: Any, given: ControlInput, put_back: bool) -> dict[str, torch.Tensor]:
    """What to sample from: the filled image encoded; with `put_back` known latents return at every step."""
    made = {"samples": vae.encode(given.filled)}
    if put_back:
        made["noise_mask"] = control_inpaint.cells(given.mask)
    return made
