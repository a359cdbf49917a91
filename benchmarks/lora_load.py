"""Claim: reading and applying an ICEdit-sized LoRA takes at most 1.2x core ComfyUI's loader.

Named peer: ComfyUI's own `load_torch_file` + `load_lora_for_models`, in the same process, in turns, the best
of each, with as many threads as torch takes. The LoRA has ICEdit's 343 modules at rank 32 in FLUX.1-Fill's
shapes (random bfloat16, 232 MB, in a temporary folder). Two figures: until the patches are on the model (a
FLUX.1-Fill without weights), where ours has also checked every value for NaN and every shape; and until the
weights are changed, which is what one waits for: the patches of one double and one single block computed on
bfloat16 weights of full size, times 19 and 38. Run with ComfyUI's interpreter:

    python benchmarks/lora_load.py /path/to/ComfyUI [--rounds 7]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1.2
PATCH_ROUNDS = 2  # of the slow part
H, RANK, DOUBLE, SINGLE = 3072, 32, 19, 38
FLUX_FILL = {
    "image_model": "flux",
    "in_channels": 96,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": H,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": DOUBLE,
    "depth_single_blocks": SINGLE,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}


def boot(comfyui: Path):
    """ComfyUI on the CPU, and the pack's LoRA package, in this process."""
    os.chdir(comfyui)
    sys.path.insert(0, str(comfyui))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    spec = importlib.util.spec_from_file_location("diptych_pack", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["diptych_pack"] = module
    spec.loader.exec_module(module)
    return importlib.import_module("diptych_pack.models.lora")


def icedit_shapes() -> dict[str, tuple[int, int]]:
    shapes = {"x_embedder": (H, 384)}
    for i in range(DOUBLE):
        block = f"transformer_blocks.{i}."
        shapes |= {f"{block}attn.{n}": (H, H) for n in ("to_k", "to_q", "to_v", "to_out.0")}
        shapes |= {f"{block}norm1.linear": (6 * H, H), f"{block}ff.net.2": (H, 4 * H)}
    for i in range(SINGLE):
        block = f"single_transformer_blocks.{i}."
        shapes |= {f"{block}attn.{n}": (H, H) for n in ("to_k", "to_q", "to_v")}
        shapes |= {f"{block}norm.linear": (3 * H, H), f"{block}proj_mlp": (4 * H, H)}
        shapes |= {f"{block}proj_out": (H, 5 * H)}
    return shapes


def write_lora(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, (out, width) in icedit_shapes().items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(RANK, width).bfloat16()
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, RANK).bfloat16()
    assert len(tensors) == 2 * 343
    save_file(tensors, path)


def flux_without_weights():
    import comfy.model_patcher
    import comfy.supported_models
    import torch
    from comfy.ldm.flux.model import FluxParams

    config = {k: v for k, v in FLUX_FILL.items() if k in {"image_model", *FluxParams.__dataclass_fields__}}
    conf = comfy.supported_models.FluxInpaint(config)
    conf.set_inference_dtype(torch.bfloat16, None)
    model = conf.get_model({}, "", device=torch.device("meta"))
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def change_weights(patcher, weights: dict) -> None:
    """The patches of these weights, computed as ComfyUI does when it loads a model."""
    import comfy.lora
    import torch

    for key, weight in weights.items():
        if key not in patcher.patches:
            continue
        comfy.lora.calculate_weight(patcher.patches[key], weight.to(torch.float32, copy=True), key).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    lora = boot(options.comfyui.resolve())
    import comfy.sd
    import comfy.utils
    import torch

    model = flux_without_weights()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "icedit.safetensors"
        write_lora(path)

        def theirs():
            sd = comfy.utils.load_torch_file(str(path), safe_load=True)
            return comfy.sd.load_lora_for_models(model, None, sd, 1.0, 0)[0]

        def ours():
            return lora.apply_to_comfy(model, lora.read(path), 1.0)[0]

        blocks = {"double_blocks.0.": DOUBLE, "single_blocks.0.": SINGLE}
        state = model.model.state_dict()
        live = {b: {k: torch.zeros_like(t, device="cpu") for k, t in state.items() if b in k} for b in blocks}
        best = {"core": [9e9] * 3, "ours": [9e9] * 3}
        for turn in range(options.rounds):
            for name, load in (("core", theirs), ("ours", ours)):
                start = time.perf_counter()
                patched = load()
                taken = [time.perf_counter() - start]
                for block, count in blocks.items() if turn < PATCH_ROUNDS else ():
                    start = time.perf_counter()
                    change_weights(patched, live[block])
                    taken.append(count * (time.perf_counter() - start))
                best[name] = [min(pair) for pair in zip(best[name], taken + [9e9] * 2, strict=False)]
    core, mine = best["core"], best["ours"]
    ratios = mine[0] / core[0], sum(mine) / sum(core)
    print(f"patches on the model: core {1e3 * core[0]:.0f} ms, ours {1e3 * mine[0]:.0f} ms: {ratios[0]:.2f}x")
    print(
        f"weights changed: core {sum(core):.1f} s, ours {sum(mine):.1f} s: {ratios[1]:.2f}x (limit {LIMIT}x)"
    )
    sys.exit(max(ratios) > LIMIT)


if __name__ == "__main__":
    main()
