"""Aspect buckets and the order of batches: which indices make up step n, in every process, today and after a
resume.

Not for reading or resizing (`sample.fit` takes the size that `bucket_sizes` names).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np


def bucket_sizes(area: int, *, multiple: int = 16, max_aspect: float = 2.0) -> list[tuple[int, int]]:
    """(height, width) pairs with both sides multiples of `multiple`, at most `area` pixels and as near to it
    as that allows, from square to `max_aspect` in both directions, ordered from tall to wide.

    Raises:
        ValueError: `area` below one `multiple` squared, or `max_aspect` below 1.
    """
    if area < multiple * multiple or max_aspect < 1:
        raise ValueError(
            f"bucket area {area} with max_aspect {max_aspect}: use an area of at least {multiple * multiple} "
            "pixels and an aspect of at least 1"
        )
    sizes = set()
    for width in range(multiple, math.isqrt(area) + multiple, multiple):
        height = area // width // multiple * multiple
        if height and width <= height <= max_aspect * width * (1 + 1e-9):
            sizes |= {(height, width), (width, height)}
    side = math.isqrt(area) // multiple * multiple
    return sorted(sizes | {(side, side)}, key=lambda size: (size[1] / size[0], size))


def nearest(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Index of the bucket whose aspect ratio is nearest (in logarithm, so that tall and wide are treated
    alike); of those, the one with the most pixels.
    """
    wanted = math.log(width / height)
    return min(
        range(len(sizes)),
        key=lambda i: (
            round(abs(math.log(sizes[i][1] / sizes[i][0]) - wanted), 9),
            -sizes[i][0] * sizes[i][1],
        ),
    )


class BucketBatchSampler:
    """An endless iterator of index lists (a torch `batch_sampler`), a pure function of (seed, step, rank,
    world_size).

    Every epoch visits every index, in a new order; a batch never mixes buckets. A global batch of
    `batch_size * world_size` indices is cut into one slice per process, so two processes see what one
    process sees at twice the batch size. A bucket's incomplete last batch is filled up with further indices
    of that bucket, so shapes and the number of steps per epoch stay constant.

    The position is the number of steps the trainer has finished, which it knows better than this iterator (a
    DataLoader reads ahead): `start_at(step)` continues from there, exactly.

    Args:
        bucket_of: the bucket of each index, for example its place among sorted sizes;
        for data of one size, zeros.
        batch_size: indices per process and step.
        indices: what the positions of `bucket_of` stand for (the readable examples); default 0, 1, 2, ...
    """

    def __init__(
        self,
        bucket_of: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        indices: Sequence[int] | None = None,
    ):
        if not len(bucket_of):
            raise ValueError("the dataset is empty: point the data option at a folder with data")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, rank {rank} of {world_size}: batch_size must be 1 or more and "
                "rank below world_size"
            )
        labels = np.asarray(bucket_of)
        names = np.arange(len(labels)) if indices is None else np.asarray(indices)
        if len(names) != len(labels):
            raise ValueError(f"{len(names)} indices for {len(labels)} buckets: pass one bucket per index")
        self._buckets = [names[labels == label] for label in np.unique(labels)]
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this process until every index was seen."""
        whole = self.batch_size * self.world_size
        return sum(-(-len(bucket) // whole) for bucket in self._buckets)

    def start_at(self, step: int) -> BucketBatchSampler:
        """Make the next iteration begin with the batch of `step` (0 = the first). Returns self."""
        self.step = step
        return self

    def epoch(self, number: int) -> list[list[int]]:
        """This process's batches of one epoch, in order."""
        rng = np.random.default_rng([self.seed, number])
        whole = self.batch_size * self.world_size
        batches = []
        for bucket in self._buckets:
            order = rng.permutation(bucket)
            order = np.resize(order, -(-len(order) // whole) * whole)
            batches += list(order.reshape(-1, self.world_size, self.batch_size)[:, self.rank])
        return [batches[i].tolist() for i in rng.permutation(len(batches))]

    def __iter__(self) -> Iterator[list[int]]:
        number, position = divmod(self.step, self.steps_per_epoch)
        while True:
            yield from self.epoch(number)[position:]
            number, position = number + 1, 0
