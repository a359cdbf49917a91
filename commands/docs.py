"""`diptych docs`: where the pages of the documentation are, or one of them in the browser."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path
from typing import Any

from .. import missing

# What each page is about; README.md of the repository has an overview.
PAGES = {
    "first-steps": "a walk for a first-time user of ComfyUI",
    "training": "train by examples: data, recipes, options",
    "grpo": "train by reward, judges",
    "outpainting": "outpainting and inpainting",
    "tiny-models": "the bundled models and their figures",
    "multimodal": "text to image and back",
    "how-it-works": "what the models see",
    "command-line": "what commands answer, exit codes, completion",
    "web": "the page of diptych web",
    "architecture": "how the code is built",
    "publishing": "names, packages, checks before a release",
}


def add_parser(subparsers) -> None:
    """Add `diptych docs` and its options to the subcommands."""
    parser = subparsers.add_parser("docs", help="where the documentation is")
    parser.add_argument("page", nargs="?", choices=PAGES, metavar="PAGE", help=f"one of {', '.join(PAGES)}")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print each page, or the one asked for, with its file in a clone, its address elsewhere."""
    pages = {name: missing.page(f"{name}.md") for name in ([args.page] if args.page else PAGES)}
    if not args.page:
        print(f"overview      {missing.DOCS.removesuffix('/docs')}/README.md")
    for name, place in pages.items():
        print(place if args.page else f"{name:<14}{PAGES[name]}\n              {place}")
    if args.open:
        first = next(iter(pages.values())) if args.page else missing.DOCS.replace("/blob/", "/tree/")
        webbrowser.open(Path(first).as_uri() if Path(first).is_file() else first)
    return {"pages": pages}
