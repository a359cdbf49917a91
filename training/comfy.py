"""Training inside ComfyUI: its memory, its inference mode, its progress bar, its stop button.

Imported by the training node at run time only. What is trained are diffusers modules of their own; ComfyUI's
models are unloaded before and never touched.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ..models.image_files import to_pil
from . import session
from .choices import Choices, configure
from .runtime import disk

logger = logging.getLogger(__name__)


class Bar:
    """ComfyUI's progress bar, and its stop button as a question.

    Updating the bar raises where the button was pressed; the trainer must write its checkpoint first, so the
    exception is kept for `finish`.
    """

    def __init__(self, total: int):
        self.bar, self.stopped = comfy.utils.ProgressBar(total), None

    def update(self, value: int, total: int, image: Tensor | None = None) -> None:
        """Show that `value` of `total` steps are done, and an image [H,W,3] beside."""
        preview = None if image is None else ("JPEG", to_pil(image), 768)
        try:
            self.bar.update_absolute(value, total, preview)
        except memory.InterruptProcessingException as stopped:
            self.stopped = stopped

    def should_stop(self) -> bool:
        """Whether the button was pressed."""
        return self.stopped is not None or memory.processing_interrupted()

    def wrap(self, items: Any, label: str) -> Iterator:
        """The caching loops: shown as a bar of their own, ended at once by the stop button."""
        total = len(items)
        for number, item in enumerate(items):
            self.update(number, total)
            self.finish()
            yield item

    def finish(self) -> None:
        """Raise ComfyUI's interruption if the button was pressed."""
        if self.stopped is not None:
            raise self.stopped
        memory.throw_exception_if_processing_interrupted()


def tell(report: str) -> None:
    """Show a report below the running node and in the console: an interrupted node returns none."""
    logger.info("%s", report)
    with contextlib.suppress(ImportError, AttributeError):  # not in every ComfyUI, not without its server
        from comfy_execution.utils import get_executing_context
        from server import PromptServer

        PromptServer.instance.send_progress_text(report, get_executing_context().node_id)


def root() -> Path:
    """Where runs and caches are kept: output/diptych_training."""
    return Path(folder_paths.get_output_directory()) / "diptych_training"


def run(choices: Choices) -> tuple[Path, session.Outcome]:
    """Train as chosen and put the LoRA into ComfyUI's loras folder; returns it and the outcome.

    Raises ValueError for choices that cannot work, before any memory is freed, and ComfyUI's interruption
    after the checkpoint of a stopped run is on disk.
    """
    loras = Path(folder_paths.get_folder_paths("loras")[0])
    disk.check_folder(loras, "ComfyUI's loras folder")
    config = configure(choices, root())
    memory.unload_all_models()
    memory.soft_empty_cache()
    bar = Bar(config.max_steps)
    try:
        # The executor runs nodes in inference mode, whose tensors can never be trained.
        with torch.inference_mode(False), torch.enable_grad():
            outcome = session.train(
                config,
                on_step=bar.update,
                should_stop=bar.should_stop,
                progress=bar.wrap,
                cpu=memory.get_torch_device().type == "cpu",
            )
    except memory.InterruptProcessingException:
        tell("stopped before the first step\nto go on, run the node again: what was cached is kept")
        raise
    finally:
        memory.soft_empty_cache()
    if outcome.lora is None:
        tell(outcome.report)
        bar.finish()
    return session.publish(outcome.lora, loras, Path(config.output_dir)), outcome
