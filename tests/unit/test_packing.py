"""Packing is exact, invertible and says clearly what it cannot take."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych.models import packing
from hypothesis import given, settings
from hypothesis import strategies as st

sizes = st.integers(1, 5)
batches = st.integers(1, 3)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool])


def random(shape, dtype):
    return (
        torch.randint(0, 2, shape).to(dtype) if not dtype.is_floating_point else torch.randn(shape).to(dtype)
    )


@settings(max_examples=40, deadline=None)
@given(batches, sizes, sizes, st.sampled_from([1, 4, 16]), dtypes)
def test_unpacking_latents_inverts_packing(batch, h, w, channels, dtype):
    latents = random((batch, channels, 2 * h, 2 * w), dtype)
    tokens = packing.pack_latents(latents)
    assert tokens.shape == (batch, h * w, 4 * channels) and tokens.dtype == dtype
    assert torch.equal(packing.unpack_latents(tokens, 2 * h, 2 * w), latents)


@settings(max_examples=40, deadline=None)
@given(batches, sizes, sizes, st.booleans(), dtypes)
def test_unpacking_masks_inverts_packing_in_either_unit(batch, h, w, with_channel, dtype):
    mask = random((batch, 16 * h, 16 * w), dtype)
    tokens = packing.pack_mask(mask[:, None] if with_channel else mask)
    assert tokens.shape == (batch, h * w, 256) and tokens.dtype == dtype
    assert torch.equal(packing.unpack_mask(tokens, 16 * h, 16 * w), mask)
    assert torch.equal(packing.unpack_mask(tokens, 2 * h, 2 * w), mask)


@settings(max_examples=20, deadline=None)
@given(sizes, sizes)
def test_each_mask_channel_is_one_pixel_of_the_token(h, w):
    mask = torch.arange(256 * h * w).reshape(1, 16 * h, 16 * w)
    tokens = packing.pack_mask(mask)
    for row in range(h):
        for column in range(w):
            block = mask[0, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            for channel in range(0, 256, 37):
                y, x, ph, pw = channel // 32, channel // 4 % 8, channel // 2 % 2, channel % 2
                assert tokens[0, row * w + column, channel] == block[8 * ph + y, 8 * pw + x]


def test_ids_are_index_row_column():
    ids = packing.image_ids(4, 6, index=2)
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[2, r, c] for r in range(2) for c in range(3)]


def test_fill_features_follow_the_latents_and_repeat_a_single_mask():
    latents, masked = torch.randn(3, 8, 64, dtype=torch.bfloat16), torch.randn(3, 8, 64)
    mask = torch.ones(1, 8, 256, dtype=torch.bool)
    features = packing.fill_features(latents, masked, mask)
    assert features.shape == (3, 8, 384) and features.dtype == torch.bfloat16
    assert torch.equal(features[..., :64], latents)
    assert torch.equal(features[..., 64:128], masked.bfloat16())
    assert bool((features[..., 128:] == 1).all())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: packing.pack_latents(torch.zeros(1, 16, 5, 4)), "4x5 cells"),
        (lambda: packing.pack_latents(torch.zeros(16, 4, 4)), "(16, 4, 4)"),
        (lambda: packing.unpack_latents(torch.zeros(1, 4, 64), 4, 6), "6x4 cells"),
        (lambda: packing.unpack_latents(torch.zeros(1, 6, 64), 3, 8), "multiples of 2"),
        (lambda: packing.pack_mask(torch.zeros(1, 767, 512)), "512x767 pixels"),
        (lambda: packing.pack_mask(torch.zeros(1, 3, 16, 16)), "(1, 3, 16, 16)"),
        (lambda: packing.unpack_mask(torch.zeros(1, 4, 256), 48, 48), "48x48"),
        (lambda: packing.unpack_mask(torch.zeros(1, 4, 64), 32, 32), "(1, 4, 64)"),
        (lambda: packing.image_ids(3, 4), "4x3 cells"),
        (
            lambda: packing.fill_features(
                torch.zeros(2, 4, 64), torch.zeros(2, 4, 64), torch.zeros(2, 5, 256)
            ),
            "mask_tokens",
        ),
        (
            lambda: packing.fill_features(
                torch.zeros(3, 4, 64), torch.zeros(2, 4, 64), torch.zeros(1, 4, 256)
            ),
            "masked_tokens",
        ),
    ],
)
def test_a_wrong_shape_is_one_clear_sentence(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and str(error.value).count(". ") == 0 and "\n" not in str(error.value)
