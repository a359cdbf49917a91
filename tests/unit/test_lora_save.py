"""What is saved reads back to the same weight change, with its scale where no reader can lose it."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_diptych.models.lora import (
    Factored,
    LoraError,
    LoraInfo,
    LoraWeights,
    LowRank,
    extract,
    read,
    save,
)
from comfyui_diptych.models.lora.based import Dora
from comfyui_diptych.models.lora.resize import resize
from comfyui_diptych.models.lora.weights import FullTensor
from safetensors import safe_open


def lora(scale=1.0, ranks=(4, 4), names=("transformer_blocks.0.attn.to_q", "proj_out"), **info):
    generator = torch.Generator().manual_seed(0)
    modules = {
        name: LowRank(torch.randn(r, 8, generator=generator), torch.randn(8, r, generator=generator), scale)
        for name, r in zip(names, ranks, strict=True)
    }
    return LoraWeights(modules, {}, LoraInfo(**info))


def header_of(path):
    with safe_open(str(path), "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.125, -1.5])
@pytest.mark.parametrize("ranks", [(4, 4), (4, 2)])
def test_diffusers_naming_folds_the_scale_and_reads_back(tmp_path, scale, ranks):
    weights = lora(scale, ranks)
    again = read(save(tmp_path / "l.safetensors", weights))
    assert not again.skipped and {m.scale for m in again.modules.values()} == {1.0}
    for name, module in weights.modules.items():
        torch.testing.assert_close(again.modules[name].dense(), module.dense(), atol=1e-5, rtol=1e-5)


def test_kohya_naming_for_a_stable_diffusion_unet_keeps_alpha(tmp_path):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    weights = lora(0.5, (4,), (name,), base="Stable Diffusion UNet")
    path = save(tmp_path / "sd.safetensors", weights)
    with safe_open(str(path), "pt") as file:
        keys = set(file.keys())
        alpha = file.get_tensor(next(k for k in keys if k.endswith(".alpha")))
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert keys == {f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{flat}.alpha"}
    assert float(alpha) == 2.0
    torch.testing.assert_close(read(path).modules[name].dense(), weights.modules[name].dense())


def test_what_was_trained_travels_in_the_header(tmp_path):
    facts = {
        "base": "FLUX Fill",
        "algorithm": "grpo",
        "reward": "shapes",
        "step": 40,
        "sigma_window": [0.9, 0.4],
    }
    info = read(save(tmp_path / "l.safetensors", lora(), facts)).info
    assert (info.base, info.algorithm, info.reward, info.step) == ("FLUX Fill", "grpo", "shapes", 40)
    assert info.sigma_window == (0.9, 0.4) and info.format == "Diptych"


def test_known_facts_are_kept_when_a_lora_is_saved_again(tmp_path):
    first = read(save(tmp_path / "a.safetensors", lora(), {"reward": "shapes", "sigma_window": (1.0, 0.5)}))
    again = read(save(tmp_path / "b.safetensors", first)).info
    assert (again.reward, again.sigma_window) == ("shapes", (1.0, 0.5))


def test_windows_of_the_first_version_keep_their_meaning(tmp_path):
    """Stable Diffusion's held the weight of the noise: sqrt(1 - alpha) at timesteps 701 and 301."""
    unet = lora(0.5, (4,), ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",))
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    old = [float((1 - alphas[timestep]).sqrt()) for timestep in (701, 301)]
    facts = {"version": 1, "algorithm": "grpo", "sigma_window": old}
    first = read(save(tmp_path / "a.safetensors", unet, facts))
    assert first.info.sigma_window == (0.701, 0.301)
    again = read(save(tmp_path / "b.safetensors", first)).info  # now of the present version
    assert again.sigma_window == (0.701, 0.301)
    now = read(save(tmp_path / "c.safetensors", unet, {**facts, "version": 2})).info.sigma_window
    flow = read(save(tmp_path / "d.safetensors", lora(), facts)).info.sigma_window
    assert now == flow == tuple(old)


def test_the_diffusers_metadata_agrees_with_the_folded_factors(tmp_path):
    path = save(tmp_path / "l.safetensors", lora(2.0, (4, 2)))
    fields = json.loads(header_of(path)["lora_adapter_metadata"])
    assert fields["transformer.r"] == fields["transformer.lora_alpha"] == 4
    assert fields["transformer.rank_pattern"] == fields["transformer.alpha_pattern"] == {"proj_out": 2}


def test_parts_of_a_fused_layer_that_share_memory_can_be_saved(tmp_path):
    A = torch.randn(4, 8)
    B = torch.randn(24, 4)
    weights = LoraWeights({f"m.{i}": LowRank(A, B[8 * i : 8 * i + 8]) for i in range(3)})
    again = read(save(tmp_path / "l.safetensors", weights))
    torch.testing.assert_close(again.modules["m.2"].dense(), B[16:] @ A)


def test_nothing_half_written_is_left_when_saving_fails(tmp_path, monkeypatch):
    import safetensors.torch

    path = save(tmp_path / "l.safetensors", lora())
    before = path.read_bytes()

    def fail(tensors, name, metadata):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError):
        save(path, lora(2.0))
    assert path.read_bytes() == before


def test_whole_tensors_are_refused_by_name(tmp_path):
    weights = LoraWeights(lora().modules, {"proj_out.bias": FullTensor(torch.zeros(8))})
    with pytest.raises(LoraError, match="proj_out.bias"):
        save(tmp_path / "l.safetensors", weights)


def checkpoint(rank=3):
    generator = torch.Generator().manual_seed(1)
    names = [f"transformer_blocks.{i}.attn.to_q.weight" for i in range(22)] + ["proj_out.bias"]
    base = {n: torch.randn(*((12,) if n.endswith("bias") else (12, 12)), generator=generator) for n in names}
    changed = names[1]
    change = torch.randn(12, rank, generator=generator) @ torch.randn(rank, 12, generator=generator)
    tuned = {**base, changed: base[changed] + change, "proj_out.bias": base["proj_out.bias"] + 1}
    full = {n: FullTensor(t, "set") for n, t in tuned.items()}
    weights = LoraWeights({}, full, LoraInfo(format="full checkpoint"), name="tuned")
    return base, weights, changed.removesuffix(".weight"), change


def test_extraction_recovers_a_low_rank_change_exactly():
    base, tuned, name, change = checkpoint(rank=3)
    got = extract(base, tuned, rank=3)
    assert list(got.modules) == [name]
    torch.testing.assert_close(got.modules[name].dense(), change, atol=1e-4, rtol=1e-4)
    assert (
        "100.0%" in got.notes[0]
        and ("proj_out.bias", "changed, but not a matrix: a LoRA cannot hold it") in got.skipped
    )


def test_extraction_is_the_best_approximation_of_its_rank():
    base, tuned, name, change = checkpoint(rank=5)
    U, S, Vh = torch.linalg.svd(change)
    best = U[:, :2] * S[:2] @ Vh[:2]
    torch.testing.assert_close(extract(base, tuned, rank=2).modules[name].dense(), best, atol=1e-4, rtol=1e-4)


def test_a_lora_has_nothing_to_extract():
    with pytest.raises(LoraError, match="already a LoRA"):
        extract({}, lora(), 4)


def test_equal_loras_give_equal_files(tmp_path):
    facts = {"reward": "shapes", "step": 40}
    names = [f"transformer_blocks.{i}.attn.to_q" for i in range(9)]
    files = [save(tmp_path / f"{i}.safetensors", lora(2.0, (4,) * 9, names), facts) for i in range(8)]
    assert len({path.read_bytes() for path in files}) == 1
    raw = files[0].read_bytes()
    facts = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert list(facts) == ["diptych", "format", "lora_adapter_metadata"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [4.0, 0.7])
def test_folding_the_scale_in_rounds_nothing_to_the_files_type(dtype, scale, tmp_path):
    name, generator = "transformer_blocks.0.attn.to_q", torch.Generator().manual_seed(0)
    A, B = (torch.randn(s, generator=generator).to(dtype) for s in ((4, 8), (8, 4)))
    module = read(save(tmp_path / "l.safetensors", LoraWeights({name: LowRank(A, B, scale)}))).modules[name]
    assert module.A.dtype == (dtype if scale == 4.0 else torch.float32)
    torch.testing.assert_close(module.dense(), scale * B.float() @ A.float(), atol=1e-6, rtol=1e-6)


def test_a_pattern_in_the_header_means_one_module_only(tmp_path):
    names = ("proj_out", "single_transformer_blocks.0.proj_out", "x_embedder")
    path = save(tmp_path / "l.safetensors", lora(1.0, (2, 4, 4), names))
    assert json.loads(header_of(path)["lora_adapter_metadata"])["transformer.rank_pattern"] == {
        "^proj_out": 2
    }


@pytest.mark.parametrize("kind", ["lokr", "dora"])
def test_what_a_lora_file_of_ours_cannot_hold_is_refused_by_name(kind, tmp_path):
    plain = next(iter(lora().modules.values()))
    kinds = {
        "lokr": Factored("lokr", {"w1": torch.ones(2, 2), "w2": torch.ones(4, 4)}),
        "dora": Dora(plain, torch.ones(8)),
    }
    with pytest.raises(LoraError, match="x_embedder is a (Factored|Dora)"):
        save(tmp_path / "l.safetensors", LoraWeights({"x_embedder": kinds[kind]}))
    with pytest.raises(LoraError, match="x_embedder is no plain pair"):
        resize(LoraWeights({"x_embedder": kinds[kind]}), 2)


def test_a_reward_curve_survives_resizing(tmp_path):
    path = save(tmp_path / "a.safetensors", lora(), {"curve": [[1, 0.25], [2, 0.5]]})
    smaller = resize(read(path), 2)
    assert read(save(tmp_path / "b.safetensors", smaller)).info.curve == ((1, 0.25), (2, 0.5))
