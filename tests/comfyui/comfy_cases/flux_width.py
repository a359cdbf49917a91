"""FLUX at its real width in real ComfyUI: one double and one single block, 3072 wide, under their real names.

Random weights, written here into the scratch folder (1.1 GB a file), loaded by core's own loader in bf16 and
in fp8. A LoRA must do what a file with the same change merged into it does. Slow, on demand: `pytest --slow`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from . import case
from .two_hosts import random_image, right_half, sample

HIDDEN, RANK = 3072, 32
IN = {"fill": 384, "kontext": 64}
# How far effects may lie apart. In fp8 the patched and the merged weight are rounded apart (core's patches by
# chance, with a seed), by 3 % of a weight that the LoRA changes by a third; seen: 0.2 to 0.28.
ROUNDING = {"default": 0.02, "fp8_e4m3fn": 0.4}
DOUBLE, SINGLE = "transformer_blocks.0.", "single_transformer_blocks.0."
# The 13 kinds of layer that ICEdit's LoRA has: BFL's name, the first row and the rows of each, its inputs.
LAYERS = {
    "x_embedder": ("img_in", 0, HIDDEN, 0),
    f"{DOUBLE}norm1.linear": ("double_blocks.0.img_mod.lin", 0, 6 * HIDDEN, HIDDEN),
    f"{DOUBLE}attn.to_q": ("double_blocks.0.img_attn.qkv", 0, HIDDEN, HIDDEN),
    f"{DOUBLE}attn.to_k": ("double_blocks.0.img_attn.qkv", HIDDEN, HIDDEN, HIDDEN),
    f"{DOUBLE}attn.to_v": ("double_blocks.0.img_attn.qkv", 2 * HIDDEN, HIDDEN, HIDDEN),
    f"{DOUBLE}attn.to_out.0": ("double_blocks.0.img_attn.proj", 0, HIDDEN, HIDDEN),
    f"{DOUBLE}ff.net.2": ("double_blocks.0.img_mlp.2", 0, HIDDEN, 4 * HIDDEN),
    f"{SINGLE}norm.linear": ("single_blocks.0.modulation.lin", 0, 3 * HIDDEN, HIDDEN),
    f"{SINGLE}attn.to_q": ("single_blocks.0.linear1", 0, HIDDEN, HIDDEN),
    f"{SINGLE}attn.to_k": ("single_blocks.0.linear1", HIDDEN, HIDDEN, HIDDEN),
    f"{SINGLE}attn.to_v": ("single_blocks.0.linear1", 2 * HIDDEN, HIDDEN, HIDDEN),
    f"{SINGLE}proj_mlp": ("single_blocks.0.linear1", 3 * HIDDEN, 4 * HIDDEN, HIDDEN),
    f"{SINGLE}proj_out": ("single_blocks.0.linear2", 0, HIDDEN, 5 * HIDDEN),
}
EXPERTS = (f"{DOUBLE}ff.net.2", f"{SINGLE}proj_out")  # where ICEdit's MoE-LoRA has its experts


def base_weights(which: str) -> dict[str, torch.Tensor]:
    """A FLUX.1 of one block of each kind in BFL's names, bf16, at the scale that keeps activations near 1."""
    h, sizes = HIDDEN, {"img_in": (HIDDEN, IN[which]), "txt_in": (HIDDEN, 4096)}
    for name, width in {"time_in": 256, "guidance_in": 256, "vector_in": 768}.items():
        sizes |= {f"{name}.in_layer": (h, width), f"{name}.out_layer": (h, h)}
    for side in ("img", "txt"):
        block = f"double_blocks.0.{side}_"
        sizes |= {f"{block}mod.lin": (6 * h, h), f"{block}attn.qkv": (3 * h, h), f"{block}attn.proj": (h, h)}
        sizes |= {f"{block}mlp.0": (4 * h, h), f"{block}mlp.2": (h, 4 * h)}
    sizes |= {"single_blocks.0.linear1": (7 * h, h), "single_blocks.0.linear2": (h, 5 * h)}
    sizes |= {"single_blocks.0.modulation.lin": (3 * h, h), "final_layer.linear": (64, h)}
    sizes["final_layer.adaLN_modulation.1"] = (2 * h, h)
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, (rows, width) in sizes.items():
        weight = torch.randn(rows, width, generator=generator, dtype=torch.float32) * width**-0.5
        weights |= {f"{name}.weight": weight.bfloat16(), f"{name}.bias": torch.zeros(rows).bfloat16()}
    norms = [f"double_blocks.0.{side}_attn.norm" for side in ("img", "txt")] + ["single_blocks.0.norm"]
    weights |= {f"{n}.{k}_norm.scale": torch.ones(128).bfloat16() for n in norms for k in ("query", "key")}
    return weights


def lora(which: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of every layer; B A is about a third of the weight, so that fp8's rounding does not hide it."""
    generator, pairs = torch.Generator().manual_seed(1), {}
    for name, (_, _, rows, width) in LAYERS.items():
        width = width or IN[which]
        down = torch.randn(RANK, width, generator=generator) * width**-0.5
        pairs[name] = down, torch.randn(rows, RANK, generator=generator) * RANK**-0.5 * 0.3
    return pairs


def merged(weights: dict, pairs: dict) -> dict:
    """The weights with every change B A added in float32."""
    out = dict(weights)
    for name, (down, up) in pairs.items():
        target, first, rows, _ = LAYERS[name]
        weight = out[f"{target}.weight"].float()
        weight[first : first + rows] += up @ down
        out[f"{target}.weight"] = weight.bfloat16()
    return out


def write_files(host, which: str) -> None:
    """Base and merged models, the plain LoRA, and one whose experts all hold the same change."""
    from safetensors.torch import save_file

    models, pairs, base = host.base / "models", lora(which), base_weights(which)
    (models / "diffusion_models").mkdir(exist_ok=True)
    save_file(base, models / "diffusion_models" / f"{which}.safetensors")
    save_file(merged(base, pairs), models / "diffusion_models" / f"{which}_merged.safetensors")
    plain, experts, generator = {}, {}, torch.Generator().manual_seed(2)
    for name, (down, up) in pairs.items():
        plain |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        if name not in EXPERTS:
            experts |= {key: value for key, value in plain.items() if f".{name}.lora" in key}
            continue
        for number in range(4):
            experts[f"transformer.{name}.lora_A.expert_{number}.weight"] = down.clone()
            experts[f"transformer.{name}.lora_B.expert_{number}.weight"] = up.clone()
        experts[f"transformer.{name}.lora_route.weight"] = torch.randn(4, down.shape[1], generator=generator)
    save_file(plain, models / "loras" / f"{which}.safetensors")
    save_file(experts, models / "loras" / f"{which}_moe.safetensors")


def remove_files(host, which: str) -> None:
    for name in (f"{which}.safetensors", f"{which}_merged.safetensors"):
        Path(host.base / "models" / "diffusion_models" / name).unlink(missing_ok=True)


def conditioned(graph, which: str, model) -> tuple:
    """(conditioning, latent) of the pack's conditioner on a random prompt and a small image."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randn(1, 8, 4096, generator=generator)
    guided = {"pooled_output": torch.randn(1, 768, generator=generator), "guidance": 30.0}
    text, vae = graph.given([[words, guided]]), graph.add("DiptychTinyModelLoader", which="fill")[2]
    image = graph.given(random_image(1, 64, 128))
    if which == "kontext":
        shared = {"conditioning": text, "vae": vae, "image": image, "size_policy": "keep"}
        return graph.add("DiptychKontextConditioner", **shared)[:2]
    shared = {"positive": text, "negative": text, "vae": vae, "image": image, "model": model}
    node = graph.add("DiptychFluxFillConditioner", mask=graph.given(right_half(1, 64, 128)), **shared)
    return node[0], node[2]


def denoised(host, which: str, dtype: str) -> dict[str, torch.Tensor]:
    """The latents of one step: base, merged weights, LoRA, experts, an open window, one that is shut."""
    graph = host.graph()
    files = {"base": f"{which}.safetensors", "merged": f"{which}_merged.safetensors"}
    models = {
        name: graph.add("UNETLoader", unet_name=file, weight_dtype=dtype)[0] for name, file in files.items()
    }
    reports = {}
    for name, file, options in (
        ("lora", which, {}),
        ("experts", f"{which}_moe", {}),
        ("open", which, {"sigma_end": 0.8}),
        ("shut", which, {"sigma_start": 0.8}),
    ):
        loader = {"model": models["base"], "lora": f"{file}.safetensors", "strength": 1.0, **options}
        models[name], reports[name], *_ = graph.add("DiptychGRPOLoraLoader", **loader)
    conditioning, latent = conditioned(graph, which, models["base"])
    latents = {name: sample(graph, model, conditioning, latent, steps=1) for name, model in models.items()}
    graph.keep(**latents, **{f"report of {name}": report for name, report in reports.items()})
    kept = host.run(graph).kept
    for name in reports:
        report = kept[f"report of {name}"]
        assert "loaded 13 modules" in report and "skipped nothing" in report, report
    return {name: kept[name]["samples"].float() for name in latents}


def off(got: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> float:
    """How far one effect is from another: |got - wanted| / |wanted - base|."""
    return float((got - wanted).norm() / (wanted - base).norm())


@case(each=lambda: [f"{which}, {dtype}" for which in IN for dtype in ROUNDING], slow=True)
def loras_do_what_merged_weights_do(host, name):
    which, dtype = name.split(", ")
    write_files(host, which)
    try:
        got = denoised(host, which, dtype)
    finally:
        remove_files(host, which)
    base, whole = got["base"], got["merged"]
    assert torch.isfinite(base).all() and (whole - base).norm() > 0.1 * base.norm()
    effects = {name: off(got[name], whole, base) for name in ("lora", "experts", "open")}
    print(name, effects)
    assert max(effects.values()) < ROUNDING[dtype], effects
    assert torch.equal(got["shut"], base)
