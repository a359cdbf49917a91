"""Preprocessing says what it did to images, and no row is left with a mask of nothing."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from comfyui_diptych.training import recipes
from comfyui_diptych.training.data.preprocess import Corpus, Preprocessor
from comfyui_diptych.training.data.sample import BrokenSample, Sample


def preprocessor(sizing, task="kontext"):
    return Preprocessor(
        SimpleNamespace(
            prompt_template="{instruction}",
            resolution=256,
            sizing=sizing,
            bucket_step=16,
            task=task,
            layout="auto",
            edit_masks=True,
            edit_loss_weight=0.0,
        ),
        "{instruction}",
    )


def row(height, width, name="a", mask=None):
    return Sample("x", torch.rand(height, width, 3), torch.rand(height, width, 3), mask, name=name)


@pytest.mark.parametrize(
    "sizing, sizes, words",
    [
        ("squash", [(64, 64), (100, 104)], ""),
        (
            "squash",
            [(64, 64), (60, 90), (64, 128)],
            "2 images were stretched .* row 2 .by 100%.: sizing=buckets",
        ),
        ("buckets", [(64, 64), (60, 90), (90, 60)], ""),
        ("buckets", [(64, 64), (32, 128)], "1 images lost more than a tenth of a side .* row 1 .56%."),
    ],
)
def test_what_sizing_did_is_reported(sizing, sizes, words):
    preprocess = preprocessor(sizing)
    for number, size in enumerate(sizes):
        preprocess(row(*size, name=f"row {number}"), torch.Generator())
    assert re.match(words, preprocess.report()) and bool(preprocess.report()) == bool(words)


def test_a_mask_that_cropping_leaves_nothing_of_is_a_broken_row():
    mask = torch.zeros(64, 1024)
    mask[:, :8] = 1
    with pytest.raises(BrokenSample, match="here: its mask lies wholly in the borders"):
        preprocessor("buckets", "fill")(row(64, 1024, "here", mask), torch.Generator())
    made = preprocessor("squash", "fill")(row(64, 1024, "here", mask), torch.Generator())
    assert bool(made.mask.any())


def test_sample_images_come_from_the_first_rows_of_their_own_data():
    c = recipes.from_dict({"task": "fill", "model": "m", "data": ["shapes:9"]})
    assert list(Corpus(c, "{instruction}").places()) == list(range(9))
    assert list(Corpus(c, "{instruction}", ["shapes:7?split=val"], limit=2).places()) == [0, 1]
