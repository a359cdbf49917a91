"""Resized LoRAs against numpy's truncated SVD, and what cannot be resized."""

from __future__ import annotations

import numpy
import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.models.lora import FullTensor, LoraError, LoraWeights, LowRank, MoeLowRank, read, save
from comfyui_diptych.models.lora.resize import resize


def check_nearest(made: torch.Tensor, change: torch.Tensor, rank: int, tolerance: float = 1e-4) -> None:
    """No matrix of the rank is nearer (Eckart and Young): what is left is what smaller singular values are.

    The matrix itself is not compared: where two singular values are close it hangs on rounding.
    """
    values = numpy.linalg.svd(change.double().numpy(), compute_uv=False)
    assert numpy.linalg.matrix_rank(made.double().numpy(), tol=1e-3 * values[0]) <= rank
    left, least = float((change - made).double().norm()), float((values[rank:] ** 2).sum() ** 0.5)
    assert left == pytest.approx(least, rel=tolerance, abs=tolerance * values[0])


def plain(out=24, width=16, rank=8, scale=0.5):
    return LowRank(torch.randn(rank, width), torch.randn(out, rank), scale)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_every_module_becomes_the_nearest_change_of_the_rank(rank):
    before = LoraWeights({"a": plain(), "b": plain(16, 40, 8, -2.0)})
    after = resize(before, rank)
    for name, module in before.modules.items():
        assert after.modules[name].rank == rank
        check_nearest(after.modules[name].dense(), module.dense(), rank)


def test_the_note_tells_the_share_of_the_change_that_is_left():
    # singular values 4, 2, 1: rank 1 keeps 16 of 21
    factors = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    made = resize(LoraWeights({"a": LowRank(factors, torch.eye(3))}), 1)
    assert f"{16 / 21:.1%}" in made.notes[-1] and made.info.rank == 1


def test_what_is_small_enough_stays_as_it_is():
    small, large = plain(rank=2), plain(rank=8)
    made = resize(LoraWeights({"small": small, "large": large}), 4)
    assert made.modules["small"] is small and made.modules["large"].rank == 4


def test_convolutions_and_types_are_kept():
    conv = LowRank(torch.randn(6, 5, 3, 3).half(), torch.randn(7, 6, 1, 1).half(), 1.5)
    made = resize(LoraWeights({"conv": conv}), 2).modules["conv"]
    assert made.A.shape == (2, 5, 3, 3) and made.B.shape == (7, 2, 1, 1) and made.A.dtype == torch.float16
    check_nearest(made.dense().flatten(1), conv.dense().flatten(1), 2, 2e-3)


@pytest.mark.parametrize(
    ("weights", "rank", "words"),
    [
        (LoraWeights({"a": plain()}), 0, "rank is 0: it must be 1 or more"),
        (
            LoraWeights({"x": MoeLowRank(torch.randn(2, 2, 4), torch.randn(2, 4, 2), torch.randn(2, 4))}),
            2,
            "x is no plain pair",
        ),
        (LoraWeights({"a": plain()}, {"norm": FullTensor(torch.ones(3))}), 2, "norm is no plain pair"),
    ],
)
def test_mistakes_are_named(weights, rank, words):
    with pytest.raises(LoraError, match=words):
        resize(weights, rank)


def test_the_command_writes_what_it_says(tmp_path, capsys):
    source = save(tmp_path / "large.safetensors", LoraWeights({"transformer_blocks.0.attn.to_q": plain()}))
    target = tmp_path / "small.safetensors"
    assert cli.main(["resize", str(source), "--rank", "3", "-o", str(target)]) == 0
    assert "of the squared change kept" in capsys.readouterr().out
    (before,), (after,) = (read(path).modules.values() for path in (source, target))
    assert after.rank == 3
    check_nearest(after.dense(), before.dense(), 3)


def test_the_command_names_a_missing_file(tmp_path, capsys):
    assert (
        cli.main(
            ["resize", str(tmp_path / "no.safetensors"), "--rank", "3", "-o", str(tmp_path / "x.safetensors")]
        )
        == 2
    )
    assert "does not exist" in capsys.readouterr().err
