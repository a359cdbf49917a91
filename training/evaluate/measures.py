"""What a score measures: columns of numbers about the images that a model made of cases.

A `Measure` takes a group of cases of one image size and the images made for them, [N,H,W,3] in 0..1, and
returns named columns [N]. How the images are made is `score.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..rewards import Context, metrics, weights
from ..rewards.clip import ClipModel
from ..rewards.vision import dino as dino_reward
from ..tiny import shapes
from .cases import Case, stack

Columns = dict[str, Tensor]
Measure = Callable[[Sequence[Case], Tensor], Columns]


def edit_masks(group: Sequence[Case]) -> Tensor:
    """Edit masks [N,H,W]; of samples without one, where source and target differ."""
    if all(case.sample.mask is not None for case in group):
        return stack(group, "mask")
    changed = metrics.changed_region(stack(group, "source"), stack(group, "target"))
    own = [case.sample.mask for case in group]
    return torch.stack([c if o is None else o for c, o in zip(changed, own, strict=True)])


def of_edits(group: Sequence[Case], edited: Tensor) -> Columns:
    """`kept_l1` (mean distance to the source outside the edit), `psnr` in dB and `ssim` (to the target).

    In the shapes world also the checker's `made`, `kept` and `success` (both).
    """
    source, target = stack(group, "source"), stack(group, "target")
    columns = {"kept_l1": metrics.kept_l1(edited, source, edit_masks(group))} | _likeness(edited, target)
    if edits := _edits(group):
        columns |= shapes.edit_success(edited, edits)
    return columns


def of_fills(group: Sequence[Case], filled: Tensor) -> Columns:
    """`kept_l1` outside the mask, and in the shapes world `caption`: the masked places show what it says."""
    columns = {"kept_l1": metrics.kept_l1(filled, stack(group, "target"), stack(group, "mask"))}
    if edits := _edits(group):
        columns["caption"] = shapes.places_match(filled, [e.target for e in edits], [e.places for e in edits])
    return columns


def of_reconstructions(group: Sequence[Case], decoded: Tensor) -> Columns:
    """`psnr` and `ssim` to the original, and in the shapes world `checker`: it still reads the scene."""
    columns = _likeness(decoded, stack(group, "target"))
    if edits := _edits(group):
        columns["checker"] = shapes.read(decoded).matches([e.target for e in edits])
    return columns


def _likeness(images: Tensor, target: Tensor) -> Columns:
    return {"psnr": metrics.psnr(images, target), "ssim": metrics.ssim(images, target)}


def _edits(group: Sequence[Case]) -> list[shapes.Edit]:
    """The edits of a group from the shapes world; empty for other data."""
    edits = [case.edit for case in group]
    return [] if any(edit is None for edit in edits) else edits


def similarities(notes: dict[str, str], clip: str, dino: str, device: str = "cpu") -> list[Measure]:
    """`clip_i` and `dino` (cosine to the target, as for MagicBrush) and `clip_t` (to the caption).

    clip, dino: folders, or hub ids that are in the local cache, "" for none: nothing is downloaded, and what
    is absent is named in `notes`.
    """
    measures: list[Measure] = []
    if folder := _on_disk(clip, notes, "clip_i and clip_t"):
        model = ClipModel.load(folder, device)

        def clip_columns(group: Sequence[Case], made: Tensor) -> Columns:
            features = model.image_features(made)
            targets = model.image_features(stack(group, "target"))
            texts = model.text_features([case.sample.caption or case.sample.prompt for case in group])
            return {"clip_i": (features * targets).sum(-1).cpu(), "clip_t": (features * texts).sum(-1).cpu()}

        measures.append(clip_columns)
    if folder := _on_disk(dino, notes, "dino"):
        reward = dino_reward(folder, device)

        def dino_column(group: Sequence[Case], made: Tensor) -> Columns:
            return {"dino": reward.score(made, Context(sources=stack(group, "target")))}

        measures.append(dino_column)
    return measures


def _on_disk(model: str, notes: dict[str, str], names: str) -> str:
    """The folder of a model, or "", which is noted for the columns `names`."""
    folder = weights.on_disk(model) if model else None
    if model and folder is None:
        notes[names] = f"{model} is not on disk"
    return str(folder or "")
