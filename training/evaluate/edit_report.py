"""What the images alone say about an edit: the numbers and the sheet of the Edit Score node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models import pixels
from ..rewards import metrics
from ..tiny import shapes
from ..tiny.shapes.words import understand
from . import plots

UNKNOWN = -1.0  # success where no checker can tell
GAIN = 3.0  # of the difference image: a third of full scale is shown white


@dataclass(frozen=True)
class EditReport:
    """Means over the batch (the node says what they mean), one line per image, an IMAGE to look at."""

    kept: float
    changed: float
    similarity: float
    success: float
    text: str
    annotated: Tensor


def edit_report(
    edited: Tensor,
    source: Tensor,
    instruction: str = "",
    mask: Tensor | None = None,
    expected: Tensor | None = None,
) -> EditReport:
    """Measure edits [B,H,W,C] against their sources; a batch of one serves all.

    mask [B,H,W], 1 = may change; without one, or with zeros alone, it is what the instruction, else the
    expected image, else the edit itself changes. Raises ValueError when the images are not of one size.
    """
    edited = _image(edited, "edited")
    source, expected = _like(source, edited, "source"), _like(expected, edited, "expected")
    batch = max(len(edited), len(source))
    edited, source = pixels.repeat_batch(edited, batch), pixels.repeat_batch(source, batch)
    target = source if expected is None else pixels.repeat_batch(expected, batch)
    edits = [_edit(image, instruction) for image in source]
    mask = pixels.painted(mask)
    if mask is None:
        mask = _edit_mask(source, edited if expected is None else target, edits)
    else:
        mask = pixels.binarise(pixels.resize_mask(mask, *edited.shape[1:3]))
        mask = pixels.repeat_batch(mask, batch)
    kept = 1 - metrics.kept_l1(edited, source, mask)
    changed = metrics.kept_l1(edited, source, 1 - mask)
    similarity = metrics.ssim(edited, target)
    success = _success(edited, edits, None if expected is None else target)
    lines = [
        f"{number}: {_kept(k)}  {_changed(c)}  ssim {s:.4f}{_verdict(v)}"
        for number, (k, c, s, v) in enumerate(zip(kept, changed, similarity, success, strict=True), 1)
    ]
    columns = {"source": source, "edited": edited} | ({} if expected is None else {"expected": target})
    columns["difference"] = ((edited - source).abs() * GAIN).clamp(0, 1)
    rows = [([column[i] for column in columns.values()], line) for i, line in enumerate(lines)]
    sheet = plots.contact_sheet(rows, tuple(columns), side=256, columns=1)
    known = success[success >= 0]
    return EditReport(
        float(kept.nanmean()) if kept.isfinite().any() else 1.0,
        float(changed.nan_to_num(0.0).mean()),
        float(similarity.mean()),
        float(known.mean()) if len(known) else UNKNOWN,
        "\n".join(([f"instruction: {instruction}"] if instruction else []) + lines),
        plots.as_image(sheet),
    )


def _image(image: Tensor, name: str) -> Tensor:
    return pixels.on_white(pixels.as_image(image, name)).cpu().clamp(0, 1)


def _edit_mask(source: Tensor, changed: Tensor, edits: Sequence[shapes.Edit | None]) -> Tensor:
    """Masks [B,H,W] of the places that known edits touch, else of where the images differ."""
    mask = metrics.changed_region(source, changed)
    for row, edit in enumerate(edits):
        if edit is not None:
            mask[row] = shapes.place_masks([edit.places], source.shape[1])[0]
    return mask


def _kept(value: Tensor) -> str:
    return "nothing to keep" if value.isnan() else f"kept {value:.4f}"


def _changed(value: Tensor) -> str:
    return "nothing to change" if value.isnan() else f"changed {value:.4f}"


def _like(image: Tensor | None, edited: Tensor, name: str) -> Tensor | None:
    if image is None:
        return None
    image = _image(image, name)
    if image.shape[1:3] != edited.shape[1:3]:
        raise ValueError(
            f"{name} is {image.shape[2]}x{image.shape[1]} but edited is "
            f"{edited.shape[2]}x{edited.shape[1]}: resize one "
            "of them, or take edited from Diptych Split, which gives the source's size"
        )
    return image


def _scene(image: Tensor) -> shapes.Scene | None:
    """The scene that an image [H,W,3] of the shapes world shows, or None for any other image."""
    height, width = image.shape[:2]
    if height != width or height < 16 or height % 2 or height > 256:
        return None
    reading = shapes.read(image[None])
    return None if (reading.template < 0).any() else reading.scene(0)


def _edit(source: Tensor, instruction: str) -> shapes.Edit | None:
    """The edit that an instruction asks for in a scene of the shapes world; None for any other."""
    scene = _scene(source) if instruction.strip() else None
    return understand(scene, instruction) if scene is not None and scene.shapes else None


def _success(edited: Tensor, edits: Sequence[shapes.Edit | None], expected: Tensor | None) -> Tensor:
    """[B]: 1 or 0 where the shapes checker can tell, else `UNKNOWN`."""
    verdicts = []
    for index, edit in enumerate(edits):
        if edit is not None:
            verdicts.append(float(shapes.edit_success(edited[index, None], [edit])["success"]))
            continue
        scene = None if expected is None else _scene(expected[index])
        known = scene is not None and scene.shapes
        verdicts.append(float(shapes.read(edited[index, None]).matches([scene])) if known else UNKNOWN)
    return torch.tensor(verdicts)


def _verdict(value: Tensor) -> str:
    return {1.0: "  success", 0.0: "  failed"}.get(float(value), "")
