"""The model families that can be trained, by the name that a recipe's `task` gives."""

from __future__ import annotations

from typing import Any

import torch

from .base import Task
from .fill import FillTask
from .glid import GlidTask
from .kontext import KontextTask
from .multimodal import MultimodalTask
from .sd_inpaint import SDInpaintTask

FAMILIES: dict[str, type[Task]] = {
    family.name: family for family in (FillTask, KontextTask, SDInpaintTask, GlidTask, MultimodalTask)
}


def make_task(config: Any, device: torch.device | str = "cpu") -> Task:
    """The family named by `config.task`. Raises ValueError for a model or LoRAs that do not fit it."""
    return FAMILIES[config.task](config, device)
