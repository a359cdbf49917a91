"""Claim: routing ICEdit's experts at FLUX width costs at most 8% over the base forward of those layers.

Named peer: the layers themselves (`double_blocks.N.img_mlp.2`, 12288 -> 3072, and `single_blocks.N.linear2`,
15360 -> 3072) without a LoRA. Ours: the same layers with 4 experts of rank 32 and their router. Both run in
one process, in turns, and the best of each counts. For scale: ICEdit's own loop over the
experts (its `moe_forward`, 2 products per expert) on the same layers.

    python benchmarks/moe_routing.py [--tokens 512] [--dtype bfloat16] [--device cuda] [--rounds 15]
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from comfyui_diptych.models.lora import MoeLowRank
from comfyui_diptych.models.lora.delta import delta_for
from torch import nn

LIMIT, EXPERTS, RANK, OUT = 1.08, 4, 32, 3072
WIDTHS = {12288: 19, 15360: 38}  # inputs -> how many of these layers FLUX has


def icedit_loop(x, y, moe: MoeLowRank):
    logits = x @ moe.router.T
    kept, index = logits.topk(1, dim=-1)
    gates = torch.zeros_like(logits).scatter(-1, index, kept.softmax(-1))
    for i in range(EXPERTS):
        y = y + gates[..., i : i + 1] * (x @ moe.A[i].T @ moe.B[i].T)
    return y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
    kind = {"dtype": getattr(torch, options.dtype), "device": options.device}

    def seconds(call) -> float:
        if options.device == "cpu":
            start = time.process_time()
            call()
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    total = {"base": 0.0, "ours": 0.0, "loop": 0.0}
    with torch.inference_mode():
        for width, count in WIDTHS.items():
            x = torch.randn(1, options.tokens, width, **kind)
            layer = nn.Linear(width, OUT, **kind)
            moe = MoeLowRank(
                torch.randn(EXPERTS, RANK, width, **kind) / width**0.5,
                torch.randn(EXPERTS, OUT, RANK, **kind),
                torch.randn(EXPERTS, width, **kind),
            )
            delta = delta_for(moe)
            runs = {
                "base": lambda x=x, layer=layer: layer(x),
                "ours": lambda x=x, layer=layer, delta=delta: delta(x, layer(x), layer),
                "loop": lambda x=x, layer=layer, moe=moe: icedit_loop(x, layer(x), moe),
            }
            times = []
            for turn in range(options.rounds):
                order = list(runs)[:: 1 if turn % 2 else -1]  # neither always finds the input in the cache
                times.append({name: seconds(runs[name]) for name in order})
            for name in runs:
                total[name] += count * min(t[name] for t in times)
    ours, loop = total["ours"] / total["base"], total["loop"] / total["base"]
    base = 1e3 * total["base"]
    print(f"{options.tokens} tokens, {options.dtype}, {options.device}: the layers take {base:.0f} ms a step")
    print(f"experts, ours {ours:.3f}x (limit {LIMIT}x); ICEdit's loop {loop:.3f}x")
    sys.exit(ours > LIMIT)


if __name__ == "__main__":
    main()
