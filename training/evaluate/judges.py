"""What scoring looks at: cases (a sample and, in the shapes world, its edit) and numbers about pictures.

Every judge takes a group of cases of one picture size and the pictures made for them, [N,H,W,3], and returns
named columns [N]. How the pictures are made is `score.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.sample import Sample
from ..rewards import metrics

Numbers = dict[str, Tensor]


class Case(NamedTuple):
    """One thing to do: a sample, and in the shapes world the edit it stands for."""

    sample: Sample
    edit: Any = None


Judge = Callable[[list[Case], Tensor], Numbers]


def shapes_cases(n: int, *, split: str = "test", seed: int = 0, size: int = 64) -> list[Case]:
    """Held-out edits of the shapes world; the caption is the target's."""
    from ..tiny import shapes

    return [
        Case(
            Sample(p.instruction, p.target, p.source, p.mask, p.caption, p.edit.operation, f"shapes {i}"),
            p.edit,
        )
        for i, p in enumerate(shapes.edit_pairs(seed, n, split, size=size))
    ]


def data_cases(source, n: int, size: int, notes: dict[str, str]) -> Iterator[Case]:
    """The first `n` readable samples of a source, at about `size` x `size` pixels and their own aspect."""
    from ..data.broken import Broken, BrokenSample
    from ..data.buckets import bucket_sizes, nearest
    from ..data.sample import fit

    sizes, given = bucket_sizes(size * size, multiple=min(64, size)), 0
    broken = Broken(len(source))
    for index in range(len(source)):
        if given == n:
            break
        try:
            sample = source[index]
        except BrokenSample as error:
            broken.record(error)
            continue
        if sample.target is None:
            raise ValueError(
                f"{sample.name} is precomputed: scoring needs pictures, for example pairs:FOLDER"
            )
        given += 1
        yield Case(fit(sample, sizes[nearest(*sample.target.shape[:2], sizes)]))
    if skipped := broken.close():
        notes["data"] = skipped


def batches(cases: Iterable[Case], size: int) -> Iterator[list[Case]]:
    """Groups of equal picture size, in order as far as that allows."""
    waiting: dict[tuple[int, ...], list[Case]] = defaultdict(list)
    for case in cases:
        group = waiting[tuple(case.sample.target.shape)]
        group.append(case)
        if len(group) == size:
            yield waiting.pop(tuple(case.sample.target.shape))
    yield from waiting.values()


def stack(group: Sequence[Case], name: str) -> Tensor:
    rows = [getattr(case.sample, name) for case in group]
    if any(row is None for row in rows):
        which = next(case.sample.name for case, row in zip(group, rows, strict=True) if row is None)
        raise ValueError(f"{which} has no {name}: this score needs one for every example")
    return torch.stack(rows)


def edit_masks(group: Sequence[Case]) -> Tensor:
    """Edit masks [N,H,W]; of samples without one, where source and target differ."""
    if all(case.sample.mask is not None for case in group):
        return stack(group, "mask")
    changed = metrics.changed_region(stack(group, "source"), stack(group, "target"))
    own = [case.sample.mask for case in group]
    return torch.stack([c if o is None else o for c, o in zip(changed, own, strict=True)])


def edits_of(group: Sequence[Case]) -> list:
    """The edits of a group from the shapes world; empty for other data."""
    edits = [case.edit for case in group]
    return [] if any(edit is None for edit in edits) else edits


def edit_numbers(group: Sequence[Case], edited: Tensor) -> Numbers:
    """Distances to source (outside the edit) and target, and in the shapes world the checker's verdict."""
    source, target = stack(group, "source"), stack(group, "target")
    numbers = pair_numbers(edited, source, target, edit_masks(group))
    if edits := edits_of(group):
        from ..tiny.shapes import edit_success

        numbers |= edit_success(edited, edits)
    return numbers


def pair_numbers(edited: Tensor, source: Tensor, target: Tensor, mask: Tensor) -> Numbers:
    """What any edit [N,H,W,3] can be measured by, [N] each; mask [N,H,W], 1 = edited."""
    return {
        "kept_l1": metrics.kept_l1(edited, source, mask),
        "psnr": metrics.psnr(edited, target),
        "ssim": metrics.ssim(edited, target),
    }


def fill_numbers(group: Sequence[Case], made: Tensor) -> Numbers:
    """Distance to the picture outside the mask, and in the shapes world whether the caption came true."""
    numbers = {"kept_l1": metrics.kept_l1(made, stack(group, "target"), stack(group, "mask"))}
    if edits := edits_of(group):
        from ..tiny.shapes import places_match

        numbers["caption"] = places_match(made, [e.target for e in edits], [e.places for e in edits])
    return numbers


def vae_numbers(group: Sequence[Case], made: Tensor) -> Numbers:
    """Distances to the original, and in the shapes world whether the checker still reads the scene."""
    target = stack(group, "target")
    numbers = {"psnr": metrics.psnr(made, target), "ssim": metrics.ssim(made, target)}
    if edits := edits_of(group):
        from ..tiny.shapes import read

        numbers["checker"] = read(made).matches([e.target for e in edits])
    return numbers


def similarity_judges(notes: dict[str, str], clip: str, dino: str, device: str = "cpu") -> list[Judge]:
    """`clip_i` and `dino` (cosine to the target, as for MagicBrush) and `clip_t` (to the caption).

    clip, dino: folders, or hub ids that are in the local cache: nothing is downloaded, and what is absent is
    named in `notes`.
    """
    judges = []
    if folder := _on_disk(clip, notes, "clip_i and clip_t"):
        from ..rewards.clip import ClipModel

        model = ClipModel.load(folder, device)

        def clip_judge(group: list[Case], made: Tensor) -> Numbers:
            features = model.image_features(made)
            targets = model.image_features(stack(group, "target"))
            texts = model.text_features([case.sample.caption or case.sample.prompt for case in group])
            return {"clip_i": (features * targets).sum(-1).cpu(), "clip_t": (features * texts).sum(-1).cpu()}

        judges.append(clip_judge)
    if folder := _on_disk(dino, notes, "dino"):
        from ..rewards import Context
        from ..rewards.vision import dino as dino_reward

        reward = dino_reward(folder, device)
        judges.append(
            lambda group, made: {"dino": reward.score(made, Context(sources=stack(group, "target")))}
        )
    return judges


def _on_disk(model: str, notes: dict[str, str], names: str) -> str | None:
    if not model:
        return None
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(model, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        notes[names] = f"{model} is not on disk"
        return None
