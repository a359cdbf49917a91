"""Every LoRA format in use reads to the weight change it was trained to be, whatever its alpha."""

from __future__ import annotations

import json
import math

import pytest
import torch
from comfyui_diptych.models.lora import read
from safetensors.torch import save_file

H, RANK = 8, 4  # width and rank of a small FLUX: attention H -> H, mlp 4H, single block 3H + 4H
SHAPES = {
    "x_embedder": (H, 64),
    "transformer_blocks.0.attn.to_q": (H, H),
    "transformer_blocks.0.attn.to_k": (H, H),
    "transformer_blocks.0.attn.to_v": (H, H),
    "transformer_blocks.0.attn.to_out.0": (H, H),
    "transformer_blocks.0.norm1.linear": (6 * H, H),
    "transformer_blocks.0.ff.net.2": (H, 4 * H),
    "single_transformer_blocks.0.attn.to_q": (H, H),
    "single_transformer_blocks.0.proj_mlp": (4 * H, H),
    "single_transformer_blocks.0.proj_out": (H, 5 * H),
}
# What a file in BFL's own layer names holds: fused projections, whose rows are q, k, v (and the mlp).
BFL_SHAPES = {
    "img_in": (H, 64),
    "double_blocks.0.img_attn.qkv": (3 * H, H),
    "double_blocks.0.txt_attn.qkv": (3 * H, H),
    "double_blocks.0.img_attn.proj": (H, H),
    "double_blocks.0.img_mlp.2": (H, 4 * H),
    "single_blocks.0.linear1": (7 * H, H),
    "single_blocks.0.linear2": (H, 5 * H),
    "final_layer.adaLN_modulation.1": (2 * H, H),
}


def factors(shapes, rank=RANK, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, i, generator=generator), torch.randn(o, rank, generator=generator))
        for name, (o, i) in shapes.items()
    }


def dense(pairs, scale=1.0):
    return {name: scale * (b @ a) for name, (a, b) in pairs.items()}


def from_bfl(changes):
    """The change of each diffusers layer, cut by hand from BFL's fused ones."""
    qkv, txt = changes["double_blocks.0.img_attn.qkv"], changes["double_blocks.0.txt_attn.qkv"]
    linear1, final = changes["single_blocks.0.linear1"], changes["final_layer.adaLN_modulation.1"]
    double, single = "transformer_blocks.0.", "single_transformer_blocks.0."
    return {
        "x_embedder": changes["img_in"],
        double + "attn.to_q": qkv[:H],
        double + "attn.to_k": qkv[H : 2 * H],
        double + "attn.to_v": qkv[2 * H :],
        double + "attn.add_q_proj": txt[:H],
        double + "attn.add_k_proj": txt[H : 2 * H],
        double + "attn.add_v_proj": txt[2 * H :],
        double + "attn.to_out.0": changes["double_blocks.0.img_attn.proj"],
        double + "ff.net.2": changes["double_blocks.0.img_mlp.2"],
        single + "attn.to_q": linear1[:H],
        single + "attn.to_k": linear1[H : 2 * H],
        single + "attn.to_v": linear1[2 * H : 3 * H],
        single + "proj_mlp": linear1[3 * H :],
        single + "proj_out": changes["single_blocks.0.linear2"],
        # BFL's final layer gives (shift, scale), diffusers' (scale, shift)
        "norm_out.linear": torch.cat([final[H:], final[:H]]),
    }


def keys(pairs, prefix, down, up, flat=False):
    out = {}
    for name, (a, b) in pairs.items():
        name = name.replace(".", "_") if flat else name
        out[f"{prefix}{name}{down}"], out[f"{prefix}{name}{up}"] = a, b
    return out


def alphas(pairs, prefix, value, flat=False):
    return {f"{prefix}{n.replace('.', '_') if flat else n}.alpha": torch.tensor(float(value)) for n in pairs}


def write(folder, tensors, header=None, name="lora.safetensors", **sidecars):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if name.endswith(".bin"):
        torch.save(tensors, path)
    else:
        save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata=header)
    for sidecar, content in sidecars.items():
        (folder / f"{sidecar}.json").write_text(json.dumps(content))
    return path


PAIRS, BFL = factors(SHAPES), factors(BFL_SHAPES)
AB = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")
FORMATS = {}


def row(name, fmt, base="FLUX dev or Kontext"):
    def add(function):
        FORMATS[name] = (function, fmt, base)
        return function

    return add


@row("diffusers without alpha", "diffusers")
def _(folder):
    return write(folder, keys(PAIRS, "transformer.", *AB)), dense(PAIRS)


@row("diffusers with alpha tensors", "diffusers")
def _(folder):
    tensors = keys(PAIRS, "transformer.", *AB) | alphas(PAIRS, "transformer.", 10)
    return write(folder, tensors), dense(PAIRS, 10 / RANK)


@row("diffusers header metadata with alpha_pattern", "diffusers")
def _(folder):
    fields = {
        "transformer.r": RANK,
        "transformer.lora_alpha": 8,
        "transformer.alpha_pattern": {"single_transformer_blocks.0.proj_out": 2},
    }
    path = write(folder, keys(PAIRS, "transformer.", *AB), {"lora_adapter_metadata": json.dumps(fields)})
    want = dense(PAIRS, 8 / RANK)
    want["single_transformer_blocks.0.proj_out"] /= 4
    return path, want


@row("PEFT folder, alpha = 2 r", "PEFT")
def _(folder):
    tensors = keys(PAIRS, "base_model.model.", *AB)
    write(
        folder,
        tensors,
        name="adapter_model.safetensors",
        adapter_config={"r": RANK, "lora_alpha": 2 * RANK},
    )
    return folder, dense(PAIRS, 2)


@row("PEFT checkpoint folder of Flow-GRPO, rsLoRA", "PEFT")
def _(folder):
    config = {"r": RANK, "lora_alpha": 6, "use_rslora": True}
    tensors = keys(PAIRS, "base_model.model.", *AB)
    write(
        folder / "checkpoint-120" / "lora", tensors, name="adapter_model.safetensors", adapter_config=config
    )
    return folder / "checkpoint-120", dense(PAIRS, 6 / math.sqrt(RANK))


@row("PEFT with rank and alpha patterns", "PEFT")
def _(folder):
    small = factors({"x_embedder": SHAPES["x_embedder"]}, rank=2, seed=3)
    pairs = PAIRS | small
    config = {
        "r": RANK,
        "lora_alpha": RANK,
        "rank_pattern": {"x_embedder": 2},
        "alpha_pattern": {"x_embedder": 6, r"transformer_blocks\.\d+\.ff\.net\.2": 1},
    }
    tensors = keys(pairs, "base_model.model.", *AB)
    path = write(folder, tensors, name="adapter_model.safetensors", adapter_config=config)
    want = dense(pairs)
    want["x_embedder"] *= 6 / 2
    want["transformer_blocks.0.ff.net.2"] *= 1 / RANK
    return path, want


@row("PEFT pickle with weights_only", "PEFT")
def _(folder):
    tensors = keys(PAIRS, "base_model.model.", *AB)
    write(folder, tensors, name="adapter_model.bin", adapter_config={"r": RANK, "lora_alpha": 1})
    return folder, dense(PAIRS, 1 / RANK)


@row("adapter name inside, base weights beside, FSDP and compile wrappers", "bare keys")
def _(folder):
    tensors = keys(PAIRS, "module._orig_mod.", ".lora_A.default.weight", ".lora_B.default.weight")
    tensors["module._orig_mod.transformer_blocks.0.attn.to_q.base_layer.weight"] = torch.ones(H, H)
    return write(folder, tensors), dense(PAIRS)


@row("bare keys of get_peft_model_state_dict", "bare keys")
def _(folder):
    return write(folder, keys(PAIRS, "", *AB)), dense(PAIRS)


@row("DanceGRPO folder with lora_config.json", "DanceGRPO")
def _(folder):
    config = {"step": 300, "lora_params": {"lora_rank": RANK, "lora_alpha": 2 * RANK, "target_modules": []}}
    place = folder / "lora-checkpoint-300-0"
    write(
        place,
        keys(PAIRS, "transformer.", *AB),
        name="pytorch_lora_weights.safetensors",
        lora_config=config,
    )
    return place, dense(PAIRS, 2)


@row("kohya, fused layers, alpha", "kohya")
def _(folder):
    tensors = keys(BFL, "lora_unet_", *KOHYA, flat=True) | alphas(BFL, "lora_unet_", 1, flat=True)
    return write(folder, tensors), from_bfl(dense(BFL, 1 / RANK))


@row("kohya, alpha only in the header", "kohya")
def _(folder):
    path = write(folder, keys(BFL, "lora_unet_", *KOHYA, flat=True), {"ss_network_alpha": "16"})
    return path, from_bfl(dense(BFL, 16 / RANK))


@row("kohya split_qkv, block-sparse at n times the trained rank", "kohya", "unknown")
def _(folder):
    qkv = {str(i): pair for i, pair in enumerate(factors(dict.fromkeys("abc", (H, H)), rank=2).values())}
    down = torch.cat([a for a, _ in qkv.values()])
    up = torch.block_diag(*[b for _, b in qkv.values()])
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(1.0),
    }
    path = write(folder, tensors, {"ss_network_args": json.dumps({"split_qkv": "True"})})
    parts = ("to_q", "to_k", "to_v")
    return path, {
        f"transformer_blocks.0.attn.{p}": 0.5 * (b @ a) for p, (a, b) in zip(parts, qkv.values(), strict=True)
    }


@row("OneTrainer, diffusers names with underscores", "OneTrainer")
def _(folder):
    tensors = keys(PAIRS, "lora_transformer_", *KOHYA, flat=True)
    tensors |= alphas(PAIRS, "lora_transformer_", 2, flat=True)
    return write(folder, tensors), dense(PAIRS, 2 / RANK)


@row("ComfyUI's own naming", "BFL names")
def _(folder):
    return write(folder, keys(BFL, "diffusion_model.", *AB)), from_bfl(dense(BFL))


@row("fal Kontext", "PEFT, BFL names")
def _(folder):
    return write(folder, keys(BFL, "base_model.model.", *AB)), from_bfl(dense(BFL))


@row("XLabs", "XLabs", "FLUX")
def _(folder):
    names = {
        "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
        "double_blocks.0.processor.qkv_lora2": "double_blocks.0.txt_attn.qkv",
        "double_blocks.0.processor.proj_lora1": "double_blocks.0.img_attn.proj",
        "single_blocks.0.processor.proj_lora": "single_blocks.0.linear2",
    }
    pairs = {written: BFL[real] for written, real in names.items()}
    single = factors({"single_blocks.0.processor.qkv_lora": (3 * H, H)}, seed=5)
    want = from_bfl(dense(BFL))
    kept = {k: v for k, v in want.items() if ".attn.to_" in k or "add_" in k or k.endswith("0.proj_out")}
    qkv = dense(single)["single_blocks.0.processor.qkv_lora"]
    for i, part in enumerate(("to_q", "to_k", "to_v")):
        kept[f"single_transformer_blocks.0.attn.{part}"] = qkv[i * H : (i + 1) * H]
    return write(folder, keys(pairs | single, "", ".down.weight", ".up.weight")), kept


@row("BFL control, enlarged img_in, biases and norms", "BFL control", "FLUX control")
def _(folder):
    wide = factors({"img_in": (H, 128)}, seed=7)
    tensors = keys(BFL | wide, "", *AB)
    tensors["single_blocks.0.linear2.lora_B.bias"] = torch.arange(float(H))
    tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.full((4,), 2.0)
    return write(folder, tensors), from_bfl(dense(BFL | wide))


@row("LoKr of ai-toolkit", "LyCORIS LoKr", "FLUX")
def _(folder):
    generator = torch.Generator().manual_seed(1)
    w1, w2 = torch.randn(2, 4, generator=generator), torch.randn(4, 2, generator=generator)
    wa, wb = torch.randn(5, 2, generator=generator), torch.randn(2, 8, generator=generator)
    w3 = torch.randn(8, 1, generator=generator)
    tensors = {
        "lycoris_single_transformer_blocks_0_attn_to_q.lokr_w1": w1,
        "lycoris_single_transformer_blocks_0_attn_to_q.lokr_w2": w2,
        "lycoris_single_transformer_blocks_0_attn_to_q.alpha": torch.tensor(1e10),
        "lycoris_single_transformer_blocks_0_proj_mlp.lokr_w1_a": wa,
        "lycoris_single_transformer_blocks_0_proj_mlp.lokr_w1_b": wb,
        "lycoris_single_transformer_blocks_0_proj_mlp.lokr_w2": w3,
        "lycoris_single_transformer_blocks_0_proj_mlp.alpha": torch.tensor(1.0),
    }
    # whole factors ignore alpha (LyCORIS), a decomposed one is scaled by alpha / rank
    return write(folder, tensors), {
        "single_transformer_blocks.0.attn.to_q": torch.kron(w1, w2),
        "single_transformer_blocks.0.proj_mlp": 0.5 * torch.kron(wa @ wb, w3),
    }


@row("LoHa on a fused layer", "LyCORIS LoHa", "unknown")
def _(folder):
    generator = torch.Generator().manual_seed(2)
    a1, a2 = (torch.randn(3 * H, 2, generator=generator) for _ in range(2))
    b1, b2 = (torch.randn(2, H, generator=generator) for _ in range(2))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{name}.hada_w1_a": a1,
        f"{name}.hada_w1_b": b1,
        f"{name}.hada_w2_a": a2,
        f"{name}.hada_w2_b": b2,
        f"{name}.alpha": torch.tensor(1.0),
    }
    change = 0.5 * (a1 @ b1) * (a2 @ b2)
    return write(folder, tensors), {
        f"transformer_blocks.0.attn.{p}": change[i * H : (i + 1) * H]
        for i, p in enumerate(("to_q", "to_k", "to_v"))
    }


UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (H, H),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": (H, H),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (4 * H, H),
    "up_blocks.1.resnets.0.time_emb_proj": (H, H),
}


@row("kohya, Stable Diffusion UNet", "kohya", "Stable Diffusion UNet")
def _(folder):
    pairs = factors(UNET)
    tensors = keys(pairs, "lora_unet_", *KOHYA, flat=True) | alphas(pairs, "lora_unet_", 1, flat=True)
    return write(folder, tensors), dense(pairs, 1 / RANK)


@row("diffusers before peft, Stable Diffusion UNet", "diffusers", "Stable Diffusion UNet")
def _(folder):
    pairs = factors(UNET)
    attention = {k: v for k, v in pairs.items() if ".attn" in k}
    written = {
        k.replace("attn1.to_q", "attn1.processor.to_q").replace("attn2.to_out.0", "attn2.processor.to_out"): v
        for k, v in attention.items()
    }
    return write(folder, keys(written, "unet.", "_lora.down.weight", "_lora.up.weight")), dense(attention)


@pytest.mark.parametrize("name", FORMATS)
def test_effective_change_equals_the_dense_reference(name, tmp_path):
    make, fmt, base = FORMATS[name]
    path, want = make(tmp_path)
    weights = read(path)
    assert set(weights.modules) == set(want)
    for layer, change in want.items():
        torch.testing.assert_close(weights.modules[layer].dense(), change, atol=1e-5, rtol=1e-5)
    assert (weights.info.format, weights.info.base) == (fmt, base)


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_of_a_file_is_loaded_or_listed_with_a_reason(name, tmp_path):
    path, want = FORMATS[name][0](tmp_path)
    weights = read(path)
    assert all(reason for _, reason in weights.skipped)
    skipped = {"adapter name inside, base weights beside, FSDP and compile wrappers": 1}
    assert len(weights.skipped) == skipped.get(name, 0)


def test_bfl_control_keeps_biases_and_norm_scales_as_whole_tensors(tmp_path):
    weights = read(FORMATS["BFL control, enlarged img_in, biases and norms"][0](tmp_path)[0])
    bias = weights.full["single_transformer_blocks.0.proj_out.bias"]
    norm = weights.full["transformer_blocks.0.attn.norm_q.weight"]
    assert bias.mode == "diff" and torch.equal(bias.value, torch.arange(float(H)))
    assert norm.mode == "set" and torch.equal(norm.value, torch.full((4,), 2.0))


def test_text_encoder_tensors_are_listed_not_lost(tmp_path):
    tensors = keys(PAIRS, "transformer.", *AB)
    tensors["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 2)
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.ones(2, 2)
    weights = read(write(tmp_path, tensors))
    assert len(weights.skipped) == 2 and all("CLIP" in reason for _, reason in weights.skipped)


def test_unknown_layers_are_listed_not_lost(tmp_path):
    tensors = keys(PAIRS, "transformer.", *AB) | {"lora_unet_wizard_hat.lora_up.weight": torch.ones(2, 2)}
    assert [key for key, _ in read(write(tmp_path, tensors)).skipped] == ["wizard_hat.B"]


PRECEDENCE = {
    ".alpha in the file": 3.0,
    "lora_adapter_metadata in the header": 5.0,
    "adapter_config.json": 7.0,
    "lora_config.json": 11.0,
    "ss_network_alpha in the header": 13.0,
    "not stored, scale 1 assumed": RANK,
}


@pytest.mark.parametrize("first", range(len(PRECEDENCE)))
def test_alpha_precedence(first, tmp_path):
    """Each source wins over all that follow it in the list."""
    present = list(PRECEDENCE)[first:]
    pairs = factors({"x_embedder": SHAPES["x_embedder"]})
    tensors, header, sidecars = keys(pairs, "transformer.", *AB), {}, {}
    if present[0] == ".alpha in the file":
        tensors |= alphas(pairs, "transformer.", 3)
    if "lora_adapter_metadata in the header" in present:
        header["lora_adapter_metadata"] = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 5})
    if "adapter_config.json" in present:
        sidecars["adapter_config"] = {"r": RANK, "lora_alpha": 7}
    if "lora_config.json" in present:
        sidecars["lora_config"] = {"lora_params": {"lora_rank": RANK, "lora_alpha": 11}}
    if "ss_network_alpha in the header" in present:
        header["ss_network_alpha"] = "13"
    write(tmp_path, tensors, header or None, **sidecars)
    module = read(tmp_path).modules["x_embedder"]  # the folder: beside a file the JSON may be a neighbour's
    assert module.scale_from == present[0]
    assert module.scale == pytest.approx(PRECEDENCE[present[0]] / RANK)


def test_scale_override_wins_over_everything(tmp_path):
    path, _ = FORMATS["PEFT folder, alpha = 2 r"][0](tmp_path)
    weights = read(path, scale=0.25)
    assert {m.scale for m in weights.modules.values()} == {0.25}


def test_training_facts_are_found_where_trainers_leave_them(tmp_path):
    assert read(FORMATS["DanceGRPO folder with lora_config.json"][0](tmp_path / "a")[0]).info.step == 300
    flow = read(FORMATS["PEFT checkpoint folder of Flow-GRPO, rsLoRA"][0](tmp_path / "b")[0])
    assert flow.info.step == 120


def test_a_file_beside_its_config_reads_like_its_folder(tmp_path):
    folder, want = FORMATS["PEFT folder, alpha = 2 r"][0](tmp_path)
    weights = read(folder / "adapter_model.safetensors")
    torch.testing.assert_close(weights.modules["x_embedder"].dense(), want["x_embedder"])


def test_a_fine_tuned_model_is_recognised_as_one(tmp_path):
    tensors = {f"transformer_blocks.{i}.attn.to_q.weight": torch.ones(4, 4) for i in range(24)}
    tensors["proj_out.bias"] = torch.zeros(4)
    write(tmp_path, tensors, name="diffusion_pytorch_model.safetensors")
    weights = read(tmp_path)
    assert weights.is_checkpoint and len(weights.full) == 25 and not weights.skipped
