"""Aspect buckets and the batch order.

`bucket_sizes(area, *, multiple=16, max_aspect=2.0) -> list[(height, width)]`, `nearest(height, width, sizes) -> int`,
`BucketBatchSampler(bucket_of, batch_size, *, seed=0, rank=0, world_size=1)`: an endless iterator of index lists, a pure
function of (seed, step). A global batch of batch_size * world_size items of one bucket is cut into one slice per process, so
two processes see exactly what one process sees at twice the batch. `start_at(step)` resumes; `steps_per_epoch` is constant.
"""

from __future__ import annotations
