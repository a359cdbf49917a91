"""What a node shows on itself in ComfyUI's page: a text, and images from the temp folder.

The page draws the images of any node's `ui`; its text is drawn by `web/js/report.js`, on nodes with an
output named report. Without that a report is read from the output, or under the node (`report_to`).
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)


def shown(text: str | None, *images: Tensor) -> dict[str, list]:
    """The `ui` of a node's answer: a text, None for none, and IMAGEs [B,H,W,3]."""
    entries = [entry for image in images for entry in saved(image)]
    ui = {} if text is None else {"text": [text]}
    return {**ui, "images": entries} if entries else ui


def report_to(node: str | None) -> Callable[[str], None] | None:
    """A function that puts a text under the node in ComfyUI's window; None where there is no window."""
    if node is None:
        return None

    def show(text: str) -> None:
        from server import PromptServer

        instance = getattr(PromptServer, "instance", None)
        if instance is not None:
            instance.send_progress_text(text, node)

    return show


def download(reward: Any) -> None:
    """Fetch what the weights of an Edit Reward lack, on the running node's progress bar.

    Raises ValueError for what can be neither found nor reached, ComfyUI's interruption at its stop button.
    """
    try:
        from comfy.utils import ProgressBar
    except ImportError:  # outside ComfyUI whoever loads the reward shows bars on the console
        return
    bar = ProgressBar(1)
    reward.fetch(lambda here, total, repository: bar.update_absolute(here, total))


def saved(image: Tensor) -> list[dict[str, str]]:
    """Write an IMAGE as PNGs into ComfyUI's temp folder and name them as `ui` does: {filename, ...}.

    [] outside ComfyUI, or where that is impossible.
    """
    try:
        import folder_paths
    except ImportError:
        return []
    from ..models.image_files import to_pil

    folder, entries = Path(folder_paths.get_temp_directory()), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for single in image:
            name = f"diptych_{uuid.uuid4().hex}.png"
            to_pil(single).save(folder / name, compress_level=1)
            entries.append({"filename": name, "subfolder": "", "type": "temp"})
    except OSError as error:  # a preview is not worth losing the result for
        logger.warning("no preview could be written to %s: %s", folder, error)
    return entries
