"""Figures, not a race: how often the bundled tiny models outpaint a held-out image right.

    python benchmarks/outpaint_tiny.py [--rows 500] [--engine fill sd_inpaint]

From one half of a held-out image (left, right, upper, lower in turn) and the caption of the whole, the
other half is painted (Outpaint Canvas, fill `edge`, the model at its usual steps, Paste Back); the checker
then reads the finished image. Right means: background and all four quadrants are as in the caption, and
nothing else is there.
"""

from __future__ import annotations

import argparse

import torch
from comfyui_diptych.models import editing, tiny
from comfyui_diptych.models.flux_fill import FluxFill
from comfyui_diptych.models.outpaint import expand, fill, paste_back
from comfyui_diptych.models.sd_inpaint import SDInpaint
from comfyui_diptych.training.tiny.shapes import edit_pairs, read

SEED, BATCH, PIXELS = 15, 25, 64
HALF = PIXELS // 2
KEPT = {  # side that is painted -> rows and columns that are known
    "right": (slice(None), slice(0, HALF)),
    "left": (slice(None), slice(HALF, None)),
    "bottom": (slice(0, HALF), slice(None)),
    "top": (slice(HALF, None), slice(None)),
}


def painted(engine: str, denoiser, halves: torch.Tensor, side: str, captions: list[str], seed: int):
    canvas, mask, layout = expand(halves, **{side: HALF})
    canvas = fill(canvas, mask, "edge")
    card = tiny.card()
    sampling = editing.Sampling(steps=card["steps"], seed=seed)
    if engine == "fill":
        guidance = card["guidance"]["fill"]
        made = editing.fill_canvas(denoiser, canvas, mask, captions, guidance=guidance, sampling=sampling)
    else:
        made = editing.inpaint_sd(denoiser, canvas, mask, captions, cfg=2.5, sampling=sampling)
    return paste_back(made, halves, layout, match_colour=True)


def measure(engine: str, rows: int) -> None:
    kind = {"fill": FluxFill, "sd_inpaint": SDInpaint}[engine]
    denoiser = kind.load(tiny.folder() / engine, torch.float32, "cpu")
    pairs = list(edit_pairs(SEED, rows, "test"))
    right, kept = [], True
    for number, start in enumerate(range(0, rows, BATCH)):
        side = list(KEPT)[number % len(KEPT)]
        group = pairs[start : start + BATCH]
        images = torch.stack([pair.target for pair in group])
        rows_kept, columns_kept = KEPT[side]
        halves = images[:, rows_kept, columns_kept].contiguous()
        made = painted(engine, denoiser, halves, side, [pair.caption for pair in group], number)
        kept &= torch.equal(made[:, rows_kept, columns_kept], halves)
        right += read(made).matches([pair.edit.target for pair in group]).tolist()
    share = sum(right) / len(right)
    print(f"{engine}: the other half is right in {100 * share:.1f} % of {len(right)};", end=" ")
    print(f"the known half {'is' if kept else 'is NOT'} the image's own")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--engine", nargs="+", default=["fill", "sd_inpaint"], choices=["fill", "sd_inpaint"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for engine in options.engine:
        measure(engine, options.rows)


if __name__ == "__main__":
    main()
