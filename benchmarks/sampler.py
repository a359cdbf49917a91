"""Claim: in ComfyUI our ODE sampler takes at most 1.02x the time of core `euler`; results equal to 1e-5.

Named peer: ComfyUI's own `euler`, on the same model, sigmas and noise. Both run in one process, in turns, and
the fastest run of each counts. The model is a small random FLUX, so that a sampler's own cost is not hidden
behind the model's: on a real FLUX the ratio is nearer to 1. Run with ComfyUI's interpreter:

    python benchmarks/sampler.py /path/to/ComfyUI
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOW_TO_GET_ONE = (
    "no ComfyUI at {}: clone https://github.com/comfyanonymous/ComfyUI, install its requirements.txt and "
    "this pack's, and give its folder"
)
DEFAULT = os.environ.get("COMFYUI_PATH", ".").split(os.pathsep)[0]
LIMIT, TOLERANCE = 1.02, 1e-5
RULES = ("flow", "dance", "cps", "rf_ancestral")
SIZES = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 64,
    "context_in_dim": 64,
    "hidden_size": 96,
    "mlp_ratio": 4.0,
    "num_heads": 3,
    "depth": 2,
    "depth_single_blocks": 4,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}


def boot(comfyui: Path, cpu: bool) -> None:
    """Import ComfyUI and the pack into this process, in the order ComfyUI needs."""
    if not (comfyui / "comfy" / "sd.py").is_file():
        sys.exit(HOW_TO_GET_ONE.format(comfyui))
    os.chdir(comfyui)
    sys.path.insert(0, str(comfyui))
    import comfy.cli_args

    comfy.cli_args.args.cpu = cpu
    spec = importlib.util.spec_from_file_location("diptych_pack", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["diptych_pack"] = module
    spec.loader.exec_module(module)


def tiny_flux():
    """A FLUX of random weights as a MODEL, and a conditioning for it."""
    import comfy.ldm.flux.model
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    known = {"image_model", *comfy.ldm.flux.model.FluxParams.__dataclass_fields__}
    config = comfy.supported_models.Flux({key: value for key, value in SIZES.items() if key in known})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    patcher = comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    pooled = torch.randn(1, 64, generator=generator)
    text = torch.randn(1, 32, 64, generator=generator)
    return patcher, [[text, {"pooled_output": pooled, "guidance": 2.5}]]


def measure(
    tokens: tuple[int, int], steps: int, rounds: int, rules: tuple[str, ...]
) -> dict[str, tuple[float, object]]:
    """{name: (fastest seconds, result)} for core's euler, our ode and the given rules, all in turns."""
    import comfy.sample
    import comfy.samplers
    import torch

    nodes = sys.modules["diptych_pack"].NODE_CLASS_MAPPINGS
    model, positive = tiny_flux()
    latent = torch.zeros(1, 16, 2 * tokens[0], 2 * tokens[1])
    noise = comfy.sample.prepare_noise(latent, 7)
    (sigmas,) = nodes["DiptychFlowMatchScheduler"]().schedule(steps, latent={"samples": latent})
    build = nodes["DiptychFlowMatchEulerSampler"]().build
    samplers = {"euler": comfy.samplers.sampler_object("euler"), "ode": build()[0]}
    samplers |= {rule: build(rule)[0] for rule in rules}

    def run(sampler):
        start = time.perf_counter()
        result = comfy.sample.sample_custom(
            model, noise, 1.0, sampler, sigmas, positive, positive, latent, disable_pbar=True, seed=7
        )
        return time.perf_counter() - start, result

    best: dict[str, tuple[float, object]] = {}
    with torch.inference_mode():
        run(samplers["euler"])  # loads the model
        for turn in range(rounds):
            order = list(samplers.items())
            for name, sampler in order if turn % 2 else reversed(order):
                seconds, result = run(sampler)
                best[name] = (min(seconds, best[name][0] if name in best else seconds), result)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40, help="runs of each sampler; the fastest counts")
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 16), metavar=("HIGH", "WIDE"))
    parser.add_argument("--rules", action="store_true", help="time the SDE rules too")
    parser.add_argument("--gpu", action="store_true", help="use ComfyUI's default device, not the CPU")
    options = parser.parse_args()
    boot(Path(options.comfyui).resolve(), cpu=not options.gpu)
    best = measure(options.tokens, options.steps, options.rounds, RULES if options.rules else ())
    core_seconds, core_result = best["euler"]
    print(f"core euler    {core_seconds * 1000 / options.steps:8.2f} ms a step")
    for name, (seconds, _) in best.items():
        if name != "euler":
            ratio = seconds / core_seconds
            print(f"{name:13} {seconds * 1000 / options.steps:8.2f} ms a step, {ratio:.3f}x euler")
    ratio = best["ode"][0] / core_seconds
    difference = (best["ode"][1] - core_result).abs().max().item()
    print(
        f"ode: {ratio:.3f}x the time (limit {LIMIT}), max difference {difference:.1e} (limit {TOLERANCE:g})"
    )
    print("met" if ratio <= LIMIT and difference <= TOLERANCE else "NOT met")


if __name__ == "__main__":
    main()
