"""A ComfyUI MODEL whose first layer takes more channels, the new ones zero, for core's merge nodes.

Imported at run time only, from a node. For files see `merge_inpaint.py`.
"""

from __future__ import annotations

from typing import Any

from .merge_inpaint import ENTRIES


def widened(model: Any, channels: int) -> Any:
    """A clone whose first layer has `channels` inputs, the old weights first; unchanged if it has them.

    For merging only: what samples it still gives it its own number. Raises ValueError for a model that is no
    Stable Diffusion UNet, or a wider one.
    """
    weights = model.model.state_dict()
    name = next((name for entry in ENTRIES if (name := f"diffusion_model.{entry}") in weights), None)
    if name is None:
        kind = type(model.model).__name__
        raise ValueError(f"model is a {kind}, not a Stable Diffusion UNet: connect SD 1.x, 2.x or SDXL.")
    shape = weights[name].shape
    if shape[1] > channels:
        raise ValueError(f"model takes {shape[1]} channels already: give channels at least as many.")
    clone = model.clone()
    if shape[1] < channels:
        # Core pads a weight to its patch where the patch says so; of zeros, one number is kept.
        zeros = weights[name].new_zeros(()).expand(shape[0], channels, *shape[2:])
        clone.add_patches({name: ("diff", (zeros, {"pad_weight": True}))})
    return clone
