"""`diptych score`: the figures of a model, with a contact sheet and a JSON file."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from . import loras, values
from .progress import Bar, quiet
from .stopping import Stop, Stopped

ENGINES = ("fill", "kontext", "sd_inpaint")
CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"  # the ones ICEdit reports
ABOUT = ("what", "engine", "model", "lora", "strength", "data", "split", "steps", "seed", "data_seed")
ABOUT += ("guidance", "autocast")  # options that score.json repeats
SHEET = 16 << 20  # bytes of room for the contact sheet and the figures
WHAT = {
    "edit": "does it make the edit that was asked for, and keep the rest",
    "fill": "does it fill a mask as the caption says (base models)",
    "vae": "how well does the VAE reconstruct",
}


def add_parser(subparsers: Any) -> None:
    """Add `diptych score` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "score",
        help="measure edit success, preservation, PSNR, SSIM (CLIP and DINO where on disk)",
        description="Score a model on held-out shapes edits or on your own data. "
        + "; ".join(f"{name}: {text}" for name, text in WHAT.items()),
    )
    parser.add_argument(
        "--model", help="diffusers folder or hub id (default: the bundled tiny model of the engine)"
    )
    loras.add_argument(parser)
    parser.add_argument(
        "--strength", type=values.finite, default=1.0, help="strength of LoRAs that name none (default 1)"
    )
    parser.add_argument("--engine", choices=ENGINES, default="fill", help="model family (default fill)")
    parser.add_argument("--what", choices=tuple(WHAT), default="edit", help="what to measure (default edit)")
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--world", choices=("shapes",), help="synthetic held-out edits with an exact checker (default)"
    )
    data.add_argument("--data", help="folder of pairs, or KIND:LOCATION as in a training recipe")
    parser.add_argument("--split", default="test", help="split of the world (default test)")
    parser.add_argument("-n", "--n", type=values.positive, default=500, help="images (default 500)")
    parser.add_argument(
        "--size",
        type=values.whole(16, values.LARGEST_SIDE),
        help="side of one panel in pixels (default 64 for shapes, else 512)",
    )
    parser.add_argument("--steps", type=values.steps, default=12, help="denoising steps (default 12)")
    parser.add_argument(
        "--guidance", type=values.finite, help="embedded guidance (default 50 diptych, 30 fill, 2.5 kontext)"
    )
    parser.add_argument(
        "--cfg", type=values.finite, help="sd_inpaint: classifier-free guidance (default 7.5)"
    )
    parser.add_argument(
        "--seed", type=values.whole(0, 2**40), default=0, help="seed of the noise (default 0)"
    )
    parser.add_argument(
        "--data-seed", type=values.seed, default=0, help="seed of the shapes edits (default 0)"
    )
    parser.add_argument(
        "--batch", type=values.positive, help="images at a time (default 50 for shapes, else 1)"
    )
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights (default: float32 on a CPU, else bfloat16)",
    )
    parser.add_argument(
        "--autocast", action="store_true", help="compute in bfloat16 (several times faster with AMX)"
    )
    parser.add_argument(
        "--clip", default=CLIP, help="CLIP for clip_i, clip_t: folder, or hub id that is on disk"
    )
    parser.add_argument("--dino", default=DINO, help="DINO: folder, or hub id that is on disk")
    parser.add_argument("-o", "--output", required=True, help="folder for score.json and contact-sheet.png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score and write score.json and a contact sheet.

    Raises ValueError for a size that is no multiple of 16, `Stopped` after a signal.
    """
    from ..training.evaluate.cases import data_cases, shapes_cases
    from ..training.runtime import disk

    disk.check_folder(args.output, need=SHEET)
    values.check_device(args.device)
    notes: dict[str, str] = {}
    size = args.size or (512 if args.data else 64)
    if size < 16 or size % 16:
        raise ValueError(
            f"size is {size}: use a multiple of 16, for example {max(16, round(size / 16) * 16)}"
        )
    if args.data:
        from ..training.data.sources import open_source

        spec = f"pairs:{args.data}" if Path(args.data).is_dir() else args.data
        source = open_source(spec)
        total, cases = min(args.n, len(source)), data_cases(source, args.n, size, notes)
    else:
        total, cases = args.n, shapes_cases(args.n, split=args.split, seed=args.data_seed, size=size)
    with Stop(
        "stopped before anything was scored", "stopping after this batch, with the figures so far"
    ) as stop:
        return _score(args, cases, total, size, notes, stop)


def _score(
    args: argparse.Namespace, cases: Any, total: int, size: int, notes: dict[str, str], stop: Stop
) -> dict[str, Any]:
    """Score and write; stopped, it writes the figures of the images scored so far."""
    from ..models.flux import default_device
    from ..training.evaluate import measures, report
    from ..training.evaluate.score import QUESTIONS, ScoreSettings, score
    from ..training.runtime import disk

    quiet()
    more: list[measures.Measure] = []
    if args.what != "vae":
        device = args.device or str(default_device())
        more = measures.similarities(notes, args.clip, args.dino, device)
    denoiser, at_sigma, lora = load(args)
    with Bar("scoring", total, "image") as bar:
        settings = ScoreSettings(
            steps=args.steps,
            seed=args.seed,
            batch=args.batch or (1 if args.data else 50),
            guidance=args.guidance,
            cfg=args.cfg,
            autocast=args.autocast,
            at_sigma=at_sigma,
            should_stop=stop.asked,
            on_scored=lambda count, found: bar.to(count, **{k: v for k, v in found.items() if "/" not in k}),
            keep_partial=True,
        )
        scores = score(denoiser, cases, QUESTIONS[args.what], settings, more=more)
    scores.notes |= notes
    about = _about(args) | {"size": size, "batch": settings.batch, "lora_report": lora}
    folder = disk.keep(args.output, lambda place: scores.save(place, about))
    path = folder / "score.json"
    made = {"figures": scores.figures(), "notes": scores.notes, "images": len(scores.rows), "score": path}
    made["report"] = report.attempt(folder)
    for name, value in scores.figures().items():
        sys.stdout.write(f"{name:24} {value:.4f}\n")
    for name, why in scores.notes.items():
        sys.stdout.write(f"{name:24} {why}\n")
    sys.stdout.write(f"{path}\n")
    if scores.failure is not None:
        raise scores.failure
    if stop.signal:
        raise Stopped(
            stop.signal, f"stopped after {len(scores.rows)} of {total} images; their figures: {path}", **made
        )
    return made


def _about(args: argparse.Namespace) -> dict[str, Any]:
    """What was scored, and the command that did it."""
    command = shlex.join(["diptych", *args.words])
    return {"command": command} | {name: getattr(args, name) for name in ABOUT}


def load(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """The denoiser with its LoRAs on, their sigma hook, and their reports."""
    import torch

    from ..models import tiny
    from ..models.flux import default_device

    folder = args.model or tiny.folder() / args.engine
    device = torch.device(args.device) if args.device else default_device()
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    chosen = [loras.read(text, args.strength) for text in args.lora]
    if args.engine == "fill":
        from ..models.flux_fill import FluxFill as Engine
    elif args.engine == "kontext":
        from ..models.flux_kontext import FluxKontext as Engine
    else:
        from ..models.sd_inpaint import SDInpaint as Engine
    denoiser = Engine.load(folder, dtype=dtype, device=device)
    module = denoiser.unet if args.engine == "sd_inpaint" else denoiser.transformer
    handles = loras.apply(module, chosen)
    return denoiser, loras.follow(handles), "\n".join(str(handle.report) for handle in handles)
