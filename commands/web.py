"""`diptych web`: a page in the browser for editing, filling, outpainting, generating and captioning."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from . import edit
from .values import check_device, whole


def add_parser(subparsers) -> None:
    """Add `diptych web` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "web",
        help="a page in the browser: edit, fill, outpaint, generate, caption",
        description="Serve a page for this machine alone (127.0.0.1) with the bundled tiny models and any "
        "others that are named. What is uploaded and made lies in a folder of its own, deleted at the end.",
    )
    add = parser.add_argument
    add(
        "--model",
        action="append",
        default=[],
        metavar="DIR_OR_HUB_ID",
        help="a further model: diffusers folder, Hugging Face id, or what `diptych train multimodal` wrote; "
        "may be repeated",
    )
    add("--loras", type=Path, metavar="FOLDER", help="LoRA files for the page's menu")
    add(
        "--judge",
        action="append",
        default=[],
        metavar="NAME[=WEIGHT][:KEY=VALUE,...]",
        help="reward that chooses the best of several; may be repeated (tiny models have their own)",
    )
    add("--port", type=whole(1, 65535), help="default 7860, or the next free one")
    add("--open", action="store_true", help="open it in the browser")
    add("--device", help="cuda, mps or cpu (default: the best there is; cpu for the tiny models)")
    add("--dtype", default="auto", choices=edit.DTYPES, help="default bfloat16, float32 for the tiny models")
    add("--offload", action="store_true", help="FLUX: keep model parts in main memory until used")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C. Raises ValueError before anything is served."""
    if find_spec("gradio") is None:
        raise ModuleNotFoundError("No module named 'gradio'", name="gradio")
    check_device(args.device)
    from ..page import models
    from ..page.backend import Backend
    from ..training.rewards import parse

    for text in args.judge:
        parse(text)
    backend = Backend(
        models.Offer(args.model, args.loras), args.device, args.dtype, args.offload, tuple(args.judge)
    )
    from ..page import app

    app.serve(backend, args.port, args.open)
