"""The nodes of the pack in ComfyUI: thin V1 classes, one file per menu.

A node is a schema, its validation, one call into `models/`, `samplers/` or `training/`, and a return.
A new node goes into the file of its menu, at the end of that file's `NODES` list.
"""

import logging
import sys

from .. import missing
from . import (
    best_of,
    canvas_store,
    compare,
    conditioning,
    control_inpaint,
    diptych,
    edit_model,
    glid,
    grpo,
    icedit,
    inspect,
    lora,
    masks,
    multimodal,
    outpaint,
    outpaint_methods,
    powerpaint,
    replaced,
    rewards,
    sampling,
    score,
    sd_inpaint,
    tiny,
    training,
)
from .guard import guard

NODE_CLASSES = [
    *diptych.NODES,
    *compare.NODES,
    *icedit.NODES,
    *masks.NODES,
    *conditioning.NODES,
    *outpaint.NODES,
    *outpaint_methods.NODES,
    *sd_inpaint.NODES,
    *control_inpaint.NODES,
    *powerpaint.NODES,
    *canvas_store.NODES,
    *glid.NODES,
    *lora.NODES,
    *sampling.NODES,
    *best_of.NODES,
    *rewards.NODES,
    *training.NODES,
    *score.NODES,
    *grpo.NODES,
    *multimodal.NODES,
    *inspect.NODES,
    *tiny.NODES,
    *edit_model.NODES,
]

NODE_CLASS_MAPPINGS = {cls.__name__: guard(cls) for cls in NODE_CLASSES}
NODE_DISPLAY_NAME_MAPPINGS = {cls.__name__: cls.DISPLAY_NAME for cls in NODE_CLASSES}
replaced.register()
if "folder_paths" in sys.modules and (lacking := missing.lacking()):  # in ComfyUI; a command says it itself
    logging.getLogger(__name__).warning("ComfyUI-Diptych: %s", lacking)
