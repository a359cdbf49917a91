"""Claim: with caches, a training step of the icedit recipe costs less than encoding text and images every
step.

    python benchmarks/train_cache.py [--steps 12] [--batch 8]

The peer is the same recipe and trainer with `cache: false`, which does every step what ICEdit's own trainer
does: two text encoders and two VAE passes. Both runs live in one process on the bundled tiny models and take
turns, step by step; the best step of each is compared. Peak memory is that of a process for each alone (its
steps after the caches are built), and what that process had before it loaded a model is shown beside it. For
FLUX the same figures follow by arithmetic: operations are counted on the real architectures (no weights are
needed), for a row of 512-pixel panels and a 512-token prompt, with gradient checkpointing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

LIMIT = 1.0


def trainer(cache: bool, folder: Path, batch: int):
    from comfyui_diptych.models import tiny
    from comfyui_diptych.training import recipes
    from comfyui_diptych.training import trainer as sft

    values = recipes.read("icedit")
    values |= {
        "model": str(tiny.folder() / "fill"),
        "data": ["shapes:64"],
        "resolution": 64,
        "batch_size": batch,
        "optimizer": "adamw",
        "lr": 1e-4,
        "mixed_precision": "no",
        "base_dtype": "float32",
        "cache_dtype": "float32",
        "sample_every": 0,
        "log_with": ["none"],
        "output_dir": str(folder / f"cache_{cache}"),
        "cache": cache,
    }
    made = sft.Trainer(recipes.from_dict(values))
    made.prepare()
    return made


def seconds(step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def resident() -> float:
    """MB of this process in memory now."""
    import psutil

    return psutil.Process().memory_info().rss / 1e6


def memory(cache: bool, folder: Path, steps: int, batch: int) -> dict[str, float]:
    """MB of a process of its own: before it loads a model, and at most while it trains."""
    command = [sys.executable, __file__, "--memory-of", str(cache), "--folder", str(folder)]
    command += ["--steps", str(steps), "--batch", str(batch)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(cache: bool, folder: Path, steps: int, batch: int) -> dict[str, float]:
    """What `memory` asks of its process, sampled: the ru_maxrss of a child begins at its parent's."""
    import threading

    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    before = resident()
    made = trainer(cache, folder, batch)
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(steps):
        made.train_step()
    done.set()
    watcher.join()
    return {"before": before, "peak": peak[0]}


def flux() -> tuple[dict[str, float], dict[str, int]]:
    """Operations of one row and bytes of weights (VAE float32, the others bfloat16) at FLUX's real size."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(in_channels=384, out_channels=64, guidance_embeds=True)
        widths = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
        t5 = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **widths))
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        tokens, words = 2 * 32 * 32, 512
        inputs = {
            "hidden_states": torch.empty(1, tokens, 384),
            "encoder_hidden_states": torch.empty(1, words, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(tokens, 3),
            "txt_ids": torch.empty(words, 3),
        }
        calls = {
            "denoiser": lambda: denoiser(**inputs),
            "t5": lambda: t5(torch.empty(1, words, dtype=torch.long)),
            "clip": lambda: clip(torch.empty(1, 77, dtype=torch.long)),
            "vae": lambda: vae.encoder(torch.empty(1, 3, 512, 1024)),
        }
    counts = {}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
            call()
        counts[name] = float(counter.get_total_flops())
    modules = {"denoiser": denoiser, "t5": t5, "clip": clip, "vae": vae}
    size = {n: sum(p.numel() for p in m.parameters()) * (4 if n == "vae" else 2) for n, m in modules.items()}
    return counts, size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--memory-of", choices=("True", "False"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = sys.stdout.write
    if options.memory_of:
        out(
            json.dumps(
                measure_memory(options.memory_of == "True", options.folder, options.steps, options.batch)
            )
        )
        return 0
    with tempfile.TemporaryDirectory() as folder:
        runs = {cache: trainer(cache, Path(folder), options.batch) for cache in (True, False)}
        for made in runs.values():
            made.train_step()
        times = {True: [], False: []}
        for _ in range(options.steps):
            for cache, made in runs.items():
                times[cache].append(seconds(made.train_step))
        cached, live = min(times[True]), min(times[False])
        used = {cache: memory(cache, Path(folder), options.steps, options.batch) for cache in (True, False)}
    ratio = cached / live
    out(
        f"tiny: {cached * 1000:.0f} ms a step with caches, {live * 1000:.0f} ms encoding: ratio {ratio:.2f}\n"
    )
    for cache, name in ((True, "with caches"), (False, "encoding")):
        out(f"tiny: peak {used[cache]['peak']:.0f} MB {name}, {used[cache]['before']:.0f} MB of it imports\n")
    counts, size = flux()
    # A LoRA step with checkpointing: forward, forward again, and the gradients of the activations.
    step = 3 * counts["denoiser"]
    encode = counts["t5"] + counts["clip"] + 2 * counts["vae"]
    out(
        f"FLUX, TFLOP a row: step {step / 1e12:.1f}, T5 {counts['t5'] / 1e12:.1f}, "
        f"CLIP {counts['clip'] / 1e12:.2f}, two VAE passes {2 * counts['vae'] / 1e12:.1f}: "
        f"ratio {step / (step + encode):.2f}\n"
    )
    with_cache = size["denoiser"] + size["vae"]
    without = sum(size.values())
    out(
        f"FLUX, GB of models in memory: {with_cache / 1e9:.1f} with caches, {without / 1e9:.1f} encoding: "
        f"ratio {with_cache / without:.2f}\n"
    )
    holds = ratio < LIMIT
    out(f"claim {'holds' if holds else 'FAILS'}: ratio {ratio:.2f} on the tiny models\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
