"""Claim: on the tiny models best-of-6 (judged after a third of the steps) edits better than one sample.

Named peers, in the same run and on the same held-out pairs and seeds: the plain sampler (one sample), and
finishing all six candidates before judging them. The judge is the checker of the shapes world on the
instruction and the source alone, so a figure is what a good judge is worth. Prints success and model
evaluations.

    python benchmarks/best_of_n.py --rows 500
"""

from __future__ import annotations

import argparse
import time

from comfyui_diptych.models import editing, tiny
from comfyui_diptych.training.evaluate.judge import Judge
from comfyui_diptych.training.rewards import Selection, parse
from comfyui_diptych.training.tiny import shapes


def load(engine: str, lora: str):
    """The tiny model of this engine with its editing LoRA."""
    import torch
    from comfyui_diptych.models.flux_fill import FluxFill
    from comfyui_diptych.models.flux_kontext import FluxKontext
    from comfyui_diptych.models.lora import apply_to_diffusers, read

    kind = FluxFill if engine == "fill" else FluxKontext
    denoiser = kind.load(str(tiny.folder() / engine), torch.float32, "cpu")
    names = tiny.card().get("default_loras", {}).get(engine, [])
    paths = [str(tiny.folder() / "loras" / name) for name in names] if lora == "auto" else [lora]
    for path in paths if lora != "none" else []:
        apply_to_diffusers(denoiser.transformer, read(path), 1.0)
    return denoiser


def edit(denoiser, engine: str, pair, sampling: editing.Sampling, candidates: int, judge_steps: int):
    """(edited image [1,H,W,3], model evaluations)."""
    guidance = tiny.card().get("guidance", {}).get(engine, 30.0 if engine == "fill" else 2.5)
    source, spent = pair.source[None], [sampling.steps]
    if candidates > 1:
        layout = None
        if engine == "fill":
            from comfyui_diptych.models import diptych

            layout = diptych.build(source, pair.instruction, panel_width=source.shape[2]).layout
        judge = Judge.of(Selection((parse("shapes"),)), pair.instruction, source, layout=layout)
        best = editing.BestOf(
            candidates,
            judge,
            judge_steps,
            batch=0,
            on_result=lambda made: spent.append(made.cost.evaluations),
        )
        sampling = editing.Sampling(steps=sampling.steps, seed=sampling.seed, best_of=best)
    options = {"panel_width": source.shape[2], "guidance": guidance, "sampling": sampling}
    function = editing.edit_with_fill if engine == "fill" else editing.edit_with_kontext
    return function(denoiser, source, pair.instruction, **options).image, spent[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="fill", choices=("fill", "kontext"))
    parser.add_argument("--lora", default="auto", help="auto = the bundled editor, a file, or none")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--candidates", type=int, default=6)
    options = parser.parse_args()
    denoiser, n = load(options.engine, options.lora), options.candidates
    ways = {
        "one sample": (1, options.steps),
        f"best of {n}": (n, max(1, round(options.steps / 3))),
        f"all {n} finished": (n, options.steps),
    }
    success, spent, seconds = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0)
    for number, pair in enumerate(shapes.edit_pairs(0, options.rows, "test")):
        # Seeds of different rows do not overlap; within a row the ways share theirs.
        sampling = editing.Sampling(steps=options.steps, seed=number * n)
        for name, (candidates, judge_steps) in ways.items():
            since = time.perf_counter()
            edited, evaluations = edit(denoiser, options.engine, pair, sampling, candidates, judge_steps)
            seconds[name] += time.perf_counter() - since
            spent[name] += evaluations
            success[name] += int(shapes.edit_success(edited, [pair.edit])["success"])
    plain = next(iter(ways))
    for name in ways:
        print(
            f"{name:16} success {success[name] / options.rows:.1%} of {options.rows}, "
            f"{spent[name] / options.rows:.0f} model evaluations an edit "
            f"({spent[name] / spent[plain]:.2f}x, {seconds[name] / seconds[plain]:.2f}x the time)"
        )
    gain = (success[f"best of {n}"] - success[plain]) / options.rows
    print(f"best of {n}: {gain:+.1%} success for {spent[f'best of {n}'] / spent[plain]:.2f}x the evaluations")
    print("met" if gain > 0 else "NOT met")


if __name__ == "__main__":
    main()
