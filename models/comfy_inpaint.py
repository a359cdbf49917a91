"""A ComfyUI MODEL of inpainting that takes a soft mask: core rounds every mask on its way to a model.

Imported at run time only, from a node.
"""

from __future__ import annotations

from typing import Any

import comfy.utils
from torch import Tensor

from .inpaint_masks import SOFT


def with_soft_mask(model: Any) -> Any:
    """A clone whose mask channel is the conditioning's soft mask [B,1,h,w] (key `SOFT`) where it has one."""
    clone = model.clone()
    core = clone.get_model_object("concat_cond")
    channel = clone.model.concat_keys.index("mask")

    def concat_cond(**conditioning: Any) -> Tensor:
        data, soft = core(**conditioning), conditioning.get(SOFT)
        if soft is None:
            return data
        soft = comfy.utils.common_upscale(soft, data.shape[-1], data.shape[-2], "bilinear", "center")
        data = data.clone()
        data[:, channel] = comfy.utils.resize_to_batch_size(soft, len(data))[:, 0].to(data)
        return data

    clone.add_object_patch("concat_cond", concat_cond)
    return clone
