"""The batch order is a pure function of seed and step, the same in any number of processes."""

from __future__ import annotations

from itertools import islice

import pytest
from comfyui_diptych.training.data.buckets import BucketBatchSampler, bucket_sizes, nearest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("multiple", [16, 64])
@pytest.mark.parametrize("side", [64, 512, 1024])
def test_buckets_are_multiples_of_16_near_the_area_in_both_orientations(side, multiple):
    sizes = bucket_sizes(side * side, multiple=multiple)
    assert (side, side) in sizes and len(sizes) == len(set(sizes))
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert height * width <= side * side and max(height / width, width / height) <= 2
        assert (width, height) in sizes
        assert height * width > side * side - multiple * max(height, width)


def test_nearest_bucket_is_found_by_aspect():
    sizes = bucket_sizes(512 * 512, multiple=64)
    assert sizes[nearest(1000, 1000, sizes)] == (512, 512)
    tall, wide = sizes[nearest(3000, 2000, sizes)], sizes[nearest(2000, 3000, sizes)]
    assert tall == wide[::-1] and tall[0] > tall[1]


buckets = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@settings(max_examples=30, deadline=None)
@given(bucket_of=buckets, batch=st.integers(1, 5), world=st.integers(1, 3), seed=st.integers(0, 99))
def test_processes_together_see_one_bucket_per_step_and_everything_once_per_epoch(
    bucket_of, batch, world, seed
):
    samplers = [
        BucketBatchSampler(bucket_of, batch, seed=seed, rank=r, world_size=world) for r in range(world)
    ]
    wide = BucketBatchSampler(bucket_of, batch * world, seed=seed)
    steps = list(zip(*(s.epoch(1) for s in samplers), strict=True))
    assert len(steps) == samplers[0].steps_per_epoch == wide.steps_per_epoch
    assert [sum(parts, []) for parts in steps] == wide.epoch(1)
    for whole in wide.epoch(1):
        assert len(whole) == batch * world and len({bucket_of[i] for i in whole}) == 1
    assert {i for whole in wide.epoch(1) for i in whole} == set(range(len(bucket_of)))


@settings(max_examples=20, deadline=None)
@given(bucket_of=buckets, batch=st.integers(1, 4), step=st.integers(0, 30))
def test_resuming_at_a_step_continues_the_same_order(bucket_of, batch, step):
    straight = list(islice(BucketBatchSampler(bucket_of, batch, seed=5), step + 10))
    resumed = list(islice(BucketBatchSampler(bucket_of, batch, seed=5).start_at(step), 10))
    assert resumed == straight[step:]


def test_epochs_differ_and_only_the_given_indices_are_used():
    sampler = BucketBatchSampler([0] * 8, 2, indices=[3, 5, 7, 9, 11, 13, 15, 17])
    assert sampler.epoch(0) != sampler.epoch(1)
    assert sorted(sum(sampler.epoch(0), [])) == [3, 5, 7, 9, 11, 13, 15, 17]
