"""Figures, not a race: how often the bundled tiny models outpaint a held-out image right.

    python benchmarks/outpaint_tiny.py [--rows 500] [--panoramas 100] [--engine fill sd_inpaint glid]

Halves: from one half of a held-out image (left, right, upper, lower in turn) and the caption of the whole,
the other half is painted (Outpaint Canvas, fill `edge`, the model at its usual steps, Paste Back); the
checker then reads the finished image. Right means: background and all four quadrants are as in the caption,
and nothing else is there.

Panoramas: a held-out image of 64 x 64 in the middle of 64 x 192 is continued to both sides by windows of 64
in steps of 32, each with its own held-out caption; a window sees what those before it painted. Right means
that the checker reads all three images of the panorama as their captions say.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace

import torch
from comfyui_diptych.models import editing, tiled, tiny
from comfyui_diptych.models.flux_fill import FluxFill
from comfyui_diptych.models.glid import paint as glid_paint
from comfyui_diptych.models.glid.model import Glid
from comfyui_diptych.models.outpaint import expand, fill, paste_back
from comfyui_diptych.models.packing import VAE_FACTOR
from comfyui_diptych.models.sd_inpaint import SDInpaint
from comfyui_diptych.training.tiny.shapes import Scene, edit_pairs, random_scene, read, render
from comfyui_diptych.training.tiny.shapes.scenes import ordered
from torch import Tensor

SEED, BATCH, PIXELS = 15, 25, 64
HALF = PIXELS // 2
CFG = 2.5
KINDS = {"fill": FluxFill, "sd_inpaint": SDInpaint, "glid": Glid}
KEPT = {  # side that is painted -> rows and columns that are known
    "right": (slice(None), slice(0, HALF)),
    "left": (slice(None), slice(HALF, None)),
    "bottom": (slice(0, HALF), slice(None)),
    "top": (slice(HALF, None), slice(None)),
}


def painted(engine: str, denoiser, halves: Tensor, side: str, captions: list[str], seed: int) -> Tensor:
    """The whole images [B,64,64,3] that a model makes of halves."""
    canvas, mask, layout = expand(halves, **{side: HALF})
    canvas = fill(canvas, mask, "edge")
    steps = tiny.card()["steps"]
    sampling = editing.Sampling(steps=steps, seed=seed)
    if engine == "fill":
        guidance = tiny.card()["guidance"]["fill"]
        made = editing.fill_canvas(denoiser, canvas, mask, captions, guidance=guidance, sampling=sampling)
    elif engine == "glid":
        made = glid_paint.paint(denoiser, canvas, mask, captions, cfg=CFG, steps=steps, seed=seed)
    else:
        made = editing.inpaint_sd(denoiser, canvas, mask, captions, cfg=CFG, sampling=sampling)
    return paste_back(made, halves, layout, match_colour=True)


def halves(engine: str, denoiser, rows: int) -> None:
    """Print how many halves are continued right."""
    pairs = list(edit_pairs(SEED, rows, "test"))
    right, kept = [], True
    for number, start in enumerate(range(0, rows, BATCH)):
        side = list(KEPT)[number % len(KEPT)]
        group = pairs[start : start + BATCH]
        images = torch.stack([pair.target for pair in group])
        rows_kept, columns_kept = KEPT[side]
        known = images[:, rows_kept, columns_kept].contiguous()
        made = painted(engine, denoiser, known, side, [pair.caption for pair in group], number)
        kept &= torch.equal(made[:, rows_kept, columns_kept], known)
        right += read(made).matches([pair.edit.target for pair in group]).tolist()
    share = sum(right) / len(right)
    print(f"{engine}: the other half is right in {100 * share:.1f} % of {len(right)};", end=" ")
    print(f"the known half {'is' if kept else 'is NOT'} the image's own", flush=True)


def beside(rng: random.Random, scene: Scene, side: str) -> Scene:
    """A held-out scene whose inner column is the outer one of `scene`: half a window further to a side."""
    other = {"left": "right", "right": "left"}[side]
    shared = [replace(s, place=s.place.replace(side, other)) for s in scene.shapes if side in s.place]
    while True:
        drawn = [s for s in random_scene(rng).shapes if side in s.place]
        colours = [scene.background, *(s.colour for s in shared + drawn)]
        found = ordered(scene.background, shared + drawn)
        if 1 <= len(found.shapes) <= 3 and len(set(colours)) == len(colours) and found.split == "test":
            return found


def panorama(rng: random.Random) -> list[Scene]:
    """Five scenes, each half a window to the right of the one before; the middle one is the known image."""
    middle = random_scene(rng, "test")
    left, right = beside(rng, middle, "left"), beside(rng, middle, "right")
    return [beside(rng, left, "left"), left, middle, right, beside(rng, right, "right")]


def continued(engine: str, denoiser, scenes: list[Scene], seed: int) -> tuple[Tensor, Tensor]:
    """The panorama [1,64,192,3] of five windows, and the image [1,64,64,3] that it began with."""
    known = render(scenes[2], PIXELS)[None]
    canvas, mask, layout = expand(known, left=PIXELS, right=PIXELS)
    canvas = fill(canvas, mask, "edge")
    steps, guidance = tiny.card()["steps"], tiny.card()["guidance"]["fill"]
    options = {"window": PIXELS, "stride": HALF, "cfg": CFG}

    def prompt(tile) -> str:
        return scenes[tile.x * VAE_FACTOR // HALF].caption

    if engine == "glid":
        made = glid_paint.paint(denoiser, canvas, mask, prompt, steps=steps, seed=seed, **options)
    else:
        sampling = editing.Sampling(steps=steps, seed=seed)
        made = tiled.paint(denoiser, canvas, mask, prompt, sampling=sampling, guidance=guidance, **options)
    return paste_back(made, known, layout, match_colour=True), known


def panoramas(engine: str, denoiser, count: int) -> None:
    """Print how many panoramas are right, and how many of their images."""
    rng = random.Random(SEED)
    right, kept = [], True
    for number in range(count):
        scenes = panorama(rng)
        made, known = continued(engine, denoiser, scenes, number)
        kept &= torch.equal(made[:, :, PIXELS : 2 * PIXELS], known)
        right.append(read(torch.cat(made.split(PIXELS, dim=2))).matches(scenes[::2]).tolist())
    whole, sides = sum(map(all, right)) / count, sum(r[0] + r[2] for r in right) / (2 * count)
    print(f"{engine}: {100 * whole:.1f} % of {count} panoramas are right,", end=" ")
    print(f"{100 * sides:.1f} % of the images beside the known one,", end=" ")
    print(f"which {'is' if kept else 'is NOT'} as it was", flush=True)


def main() -> None:
    """Measure what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500, help="halves; 0 for none")
    parser.add_argument("--panoramas", type=int, default=100, help="0 for none")
    parser.add_argument("--engine", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--model", help="a diffusers folder in place of the bundled one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for engine in options.engine:
        denoiser = KINDS[engine].load(options.model or tiny.folder() / engine, torch.float32, "cpu")
        if options.rows:
            halves(engine, denoiser, options.rows)
        if options.panoramas:
            panoramas(engine, denoiser, options.panoramas)


if __name__ == "__main__":
    main()
