"""Claims: the canvas with its feather takes under a tenth of core's time, a crop and its stitch no more than
the PIL route, and tiles need the same memory at 4096 pixels as at 1024, but for the canvas itself.

Named peers: ComfyUI's own ImagePadForOutpaint on a 2048 x 2048 image; for the context crop a route through
PIL (8-bit crop, Lanczos resize and back, paste by the mask), which is what a script without this pack does.
Tiles: the tiny Fill transformer paints an unknown canvas window by window, one child process for each size;
its peak memory is counted above that of the process before. Run with ComfyUI's interpreter:

    python benchmarks/outpaint.py /path/to/ComfyUI
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
HOW_TO_GET_ONE = (
    "no ComfyUI at {}: clone https://github.com/comfyanonymous/ComfyUI, install its requirements.txt and this"
    " pack's, and give its folder"
)
FEATHER, PIXELS, EXPAND = 40, 2048, 256


def room(name: str):
    """A module of the pack, which is imported under a name of its own, as ComfyUI does it."""
    if "diptych_pack" not in sys.modules:
        spec = importlib.util.spec_from_file_location("diptych_pack", ROOT / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["diptych_pack"] = module
        spec.loader.exec_module(module)
    return import_module(f"diptych_pack.{name}")


def core_pad(comfyui: Path):
    """ComfyUI's own node."""
    if not (comfyui / "nodes.py").is_file():
        sys.exit(HOW_TO_GET_ONE.format(comfyui))
    os.chdir(comfyui)
    sys.path.insert(0, str(comfyui))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    return import_module("nodes").ImagePadForOutpaint()


def best(calls: dict, rounds: int) -> dict[str, float]:
    """The fastest of so many runs of each, in turns, in ms."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1000)
    return {name: min(values) for name, values in times.items()}


def canvas(comfyui: Path, rounds: int) -> None:
    pad, expand = core_pad(comfyui), room("models.outpaint").expand
    axis = room("models.outpaint.canvas")
    image = torch.rand(1, PIXELS, PIXELS, 3)
    sides = dict.fromkeys(("left", "top", "right", "bottom"), EXPAND)
    ours, mask, _ = expand(image, **sides, feather=FEATHER)
    theirs, core_mask = pad.expand_image(image, **sides, feathering=FEATHER)
    assert torch.equal(ours, theirs) and torch.allclose(mask, core_mask, atol=1e-6)

    def feather_alone() -> None:
        line = axis._make_axis(("left", "right"), {"left": EXPAND, "right": EXPAND}, PIXELS, 16)
        ramp = line.ramp(0, FEATHER, "width")
        torch.maximum(ramp[:, None], ramp[None])

    times = best(
        {"feather": feather_alone, "expand": lambda: expand(image, **sides, feather=FEATHER)}, rounds
    ) | best({"core": lambda: pad.expand_image(image, **sides, feathering=FEATHER)}, 2)
    print(f"{PIXELS} x {PIXELS}, {EXPAND} px on each side, feather {FEATHER}, same canvas and mask:")
    print(f"  feather {times['feather']:.1f} ms, canvas with feather {times['expand']:.1f} ms,", end=" ")
    print(f"core {times['core']:.0f} ms")
    print(f"ratio ours / core: {times['expand'] / times['core']:.3f} (below 0.1 wanted)")


def crop(rounds: int) -> None:
    import numpy as np
    from PIL import Image

    rooms = room("models.outpaint")
    image, mask = torch.rand(1, PIXELS, PIXELS, 3), torch.zeros(1, PIXELS, PIXELS)
    mask[:, 700:1200, 600:1250] = 1
    cut, _, layout = rooms.crop_context(image, mask)
    spot, size = layout.spots[0], layout.canvas_size

    def ours() -> None:
        part, _, at = rooms.crop_context(image, mask)
        rooms.paste_back(part, image, at)

    def through_pil() -> None:
        pil = Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8))
        hole = Image.fromarray((mask[0].numpy() * 255).round().astype(np.uint8))
        left, top, right, bottom = hole.getbbox()
        box = (spot.left, spot.top, spot.left + spot.width, spot.top + spot.height)
        assert box[0] <= left and box[1] <= top and box[2] >= right and box[3] >= bottom
        part = pil.crop(box).resize(size[::-1], Image.Resampling.LANCZOS)
        hole.crop(box).resize(size[::-1], Image.Resampling.NEAREST)
        seen = torch.from_numpy(np.array(part).astype(np.float32) / 255)[None]
        back = Image.fromarray((seen[0].numpy() * 255).round().astype(np.uint8))
        back = back.resize((spot.width, spot.height), Image.Resampling.LANCZOS)
        pil.paste(back, box[:2], hole.crop(box))
        torch.from_numpy(np.array(pil).astype(np.float32) / 255)[None]

    times = best({"ours": ours, "pil": through_pil}, rounds)
    print(f"crop of {spot.width} x {spot.height} from {PIXELS} x {PIXELS} to {size[1]} x {size[0]} and back:")
    print(f"  ours {times['ours']:.0f} ms, PIL route {times['pil']:.0f} ms")
    print(f"ratio ours / PIL: {times['ours'] / times['pil']:.2f} (below 1 is faster)")


def peak() -> int:
    """The most memory that this process has held, in MiB."""
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 if sys.platform == "linux" else 1024) // 1024
    )


@torch.no_grad()
def paint_tiles(side: int, tiles: int) -> None:
    """Paint some windows of an unknown canvas of `side` pixels with the tiny Fill model; print the memory."""
    denoiser, packing = room("models.denoiser"), room("models.packing")
    sampling, flow = room("samplers.tiles"), room("samplers.flow_match")
    fill = room("models.flux_fill").FluxFill.load(room("models.tiny").folder() / "fill")
    text = fill.encode_text("a red circle on a blue ground")
    cells = side // 8
    unknown = torch.ones(cells, cells, dtype=torch.bool)
    unknown[: cells // 2, : cells // 2] = False
    plan = sampling.plan(unknown)

    def paint(context, hole, noise, tile):
        mask = hole.float().repeat_interleave(8, 0).repeat_interleave(8, 1)[None]
        features = torch.cat([packing.pack_latents(context), packing.pack_mask(mask)], dim=-1)
        guidance = fill.guidance_tensor(30.0, 1)
        condition = denoiser.Condition(text=text, guidance=guidance, features=features)
        sigmas = torch.linspace(1, 0, 3)
        return flow.sample(lambda x, sigma: fill.velocity(x, sigma, condition), noise, sigmas)

    canvas = torch.zeros(1, 16, cells, cells)
    before = peak()
    sampling.sample(paint, canvas, unknown, plan[:tiles])
    print(len(plan), before, peak(), canvas.numel() * 4 // 2**20)


def tiles(count: int) -> None:
    above = {}
    for side in (1024, 4096):
        command = [sys.executable, __file__, "--paint", str(side), "--tiles", str(count)]
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        planned, before, after, canvas_size = map(int, line.split())
        above[side] = after - before
        print(f"tiles at {side}: {planned} windows planned, {count} painted, peak {after} MiB,", end=" ")
        print(f"{after - before} above the loaded model; the canvas' latents are {canvas_size} MiB")
    print(f"ratio of peaks above the model, 4096 / 1024: {above[4096] / above[1024]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, nargs="?", default=os.environ.get("COMFYUI_PATH", "."))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiles", type=int, default=6, help="windows painted at each size")
    parser.add_argument("--paint", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.paint:
        paint_tiles(options.paint, options.tiles)
        return
    comfyui, sys.argv = options.comfyui.resolve(), sys.argv[:1]
    tiles(options.tiles)
    crop(options.rounds)
    canvas(comfyui, options.rounds)


if __name__ == "__main__":
    main()
