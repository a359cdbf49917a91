"""`diptych generate`: images for a text, by the multimodal model."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from . import images, multimodal
from .progress import Bar
from .stopping import Stop
from .values import finite, seed, whole

MOST = 1024  # images, and steps of the model's schedule


def add_parser(subparsers: Any) -> None:
    """Add `diptych generate` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "generate",
        help="make an image for a text (small multimodal model)",
        description="Make images for a text with a multimodal latent-diffusion model (docs/multimodal.md): a "
        "small system of its own, which knows what it was trained on and nothing else.",
    )
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="what the image shows, in the words of the training captions")
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("generated.png"),
        metavar="OUT.png",
        help="default %(default)s",
    )
    multimodal.add_arguments(parser)
    add(
        "--count",
        type=whole(1, MOST),
        default=1,
        help="images; several are OUT_1.png, OUT_2.png ... (default 1)",
    )
    add("--steps", type=whole(1, 1000), help="sampling steps (default 50)")
    add("--cfg", type=finite, help="how far to go beyond the prediction without a text (default 2, 1 = off)")
    add("--seed", type=seed, default=42, help="of the noise (default 42)")
    add("--direct", action="store_true", help="decode the text's embedding, without diffusion")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the images. Raises ValueError or FileNotFoundError before the images are made."""
    prompt, paths = args.prompt.strip(), _paths(args.output, args.count)
    if not prompt:
        raise ValueError("the prompt is empty: say what the image shows")
    for option in ("steps", "cfg"):
        if args.direct and getattr(args, option) is not None:
            raise ValueError(f"--{option} does nothing with --direct: leave one out")
    for path in paths:
        images.check_writable(path)
    from ..models.multimodal.reading import remarks

    folder = multimodal.check_model(args)
    with Stop("stopped before the images were made: nothing was written"):
        model = multimodal.load(folder, args)
        told = remarks(model, prompt)
        sys.stderr.writelines(f"{remark}\n" for remark in told)
        made = _generate(model, prompt, args)
    written = [images.save(images.to_pil(image), path) for path, image in zip(paths, made, strict=True)]
    sys.stdout.writelines(f"{path}\n" for path in written)
    return {"images": written, "prompt": prompt, "model": folder, "seed": args.seed, "remarks": told}


def _generate(model: Any, prompt: str, args: argparse.Namespace) -> Any:
    """IMAGE [count,S,S,3], with a bar of the steps."""
    from ..models.multimodal.model import BATCH

    steps = args.steps or 50
    parts = 0 if args.direct else -(-args.count // BATCH)
    with nullcontext() if args.direct else Bar("generating", steps * parts) as bar:
        return model.generate_from_text(
            [prompt],
            args.count,
            not args.direct,
            steps,
            args.seed,
            cfg=2.0 if args.cfg is None else args.cfg,
            callback=lambda *_: bar.advance(),
        )


def _paths(output: Path, count: int) -> list[Path]:
    """`out.png` for one image, `out_1.png`, `out_2.png`, ... for several."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}_{number}{output.suffix}") for number in range(1, count + 1)]
