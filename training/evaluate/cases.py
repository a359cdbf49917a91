"""What a score is measured on: cases, held-out edits of the shapes world or the examples of a dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.buckets import bucket_sizes, nearest
from ..data.sample import Broken, BrokenSample, Sample, fit
from ..data.sources import Source
from ..tiny import shapes


class Case(NamedTuple):
    """One thing to do: a sample, and in the shapes world the edit it stands for."""

    sample: Sample
    edit: shapes.Edit | None = None


def shapes_cases(n: int, *, split: str = "test", seed: int = 0, size: int = 64) -> list[Case]:
    """`n` edits of the shapes world, `size` pixels wide and high; the caption is the target's."""
    return [
        Case(
            Sample(p.instruction, p.target, p.source, p.mask, p.caption, p.edit.operation, f"shapes {i}"),
            p.edit,
        )
        for i, p in enumerate(shapes.edit_pairs(seed, n, split, size=size))
    ]


def data_cases(source: Source, n: int, size: int, notes: dict[str, str]) -> Iterator[Case]:
    """The first `n` readable samples of a source, at about `size` x `size` pixels and their own aspect.

    Broken samples are left out; how many stands in notes["data"] in the end. Raises ValueError for
    precomputed samples, which hold no images.
    """
    sizes, count = bucket_sizes(size * size, multiple=min(64, size)), 0
    broken = Broken(len(source))
    for index in range(len(source)):
        if count == n:
            break
        try:
            sample = source[index]
        except BrokenSample as error:
            broken.record(error)
            continue
        if sample.target is None:
            raise ValueError(f"{sample.name} is precomputed: scoring needs images, for example pairs:FOLDER")
        count += 1
        yield Case(fit(sample, sizes[nearest(*sample.target.shape[:2], sizes)]))
    if skipped := broken.close():
        notes["data"] = skipped


def batches(cases: Iterable[Case], size: int) -> Iterator[list[Case]]:
    """Groups of equal image size, `size` cases each, in order as far as that allows; the rest last."""
    waiting: dict[tuple[int, ...], list[Case]] = defaultdict(list)
    for case in cases:
        group = waiting[tuple(case.sample.target.shape)]
        group.append(case)
        if len(group) == size:
            yield waiting.pop(tuple(case.sample.target.shape))
    yield from waiting.values()


def stack(group: Sequence[Case], name: str) -> Tensor:
    """A field of every sample, images [N,H,W,3] or masks [N,H,W].

    Raises ValueError naming a sample that has none.
    """
    rows = [getattr(case.sample, name) for case in group]
    if any(row is None for row in rows):
        which = next(case.sample.name for case, row in zip(group, rows, strict=True) if row is None)
        raise ValueError(f"{which} has no {name}: this score needs one for every example")
    return torch.stack(rows)
