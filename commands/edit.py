"""`diptych edit`: an image and an instruction to an edited image, and both side by side.

Whatever is wrong with the input is found before a model is loaded. The work is done by `models/editing.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.geometry import AUTO_POLICIES
from ..models.image_files import looks_like_image
from . import best_of, images, loras
from .progress import Bar, quiet
from .stopping import Stop
from .values import LARGEST_SIDE, check_device, finite, seed, steps, whole

DTYPES = ("auto", "float32", "bfloat16", "float16")
ENGINES = ("fill", "kontext")
DEMO_EXAMPLE = 7  # the held-out image that README.md shows


def add_parser(subparsers) -> None:
    """Add `diptych edit` and its options to the subcommands."""
    parser = subparsers.add_parser(
        "edit",
        help="edit an image by instruction",
        description="Edit an image by instruction. Without --model the bundled tiny model does it, which "
        "knows only small images of coloured shapes; without an image one of those is drawn.",
    )
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="image to edit")
    add("instruction", nargs="?", metavar="INSTRUCTION", help='what to change, e.g. "make the sky orange"')
    add("-o", "--output", type=Path, default=Path("edited.png"), metavar="OUT.png", help="default edited.png")
    add("--engine", choices=ENGINES, help="ICEdit diptych on FLUX Fill, or Kontext (default: by the model)")
    add("--model", metavar="DIR_OR_HUB_ID", help="diffusers folder or Hugging Face id (default: bundled)")
    loras.add_argument(parser)
    add("--lora-strength", type=finite, default=1.0, help="strength of LoRAs that name none (default 1)")
    add("--steps", type=steps, help="sampling steps (default 28)")
    add("--guidance", type=finite, help="embedded guidance (default 50 for fill, 2.5 for kontext)")
    add("--negative", help="kontext: negative prompt")
    add("--cfg", type=finite, default=1.0, help="kontext: scale of the negative prompt (default 1, off)")
    add("--seed", type=seed, default=0, help="of the noise (default 0)")
    add("--rule", default="ode", help="step rule: ode, flow, dance, cps or rf_ancestral (default ode)")
    add("--eta", type=finite, help="noise of an SDE rule (default: the rule's own)")
    best_of.add_arguments(parser)
    add("--mask", metavar="MASK", help="fill: edit only where this image is white")
    add("--reference", action="append", default=[], metavar="IMAGE", help="kontext: a further image")
    add(
        "--panel-width",
        type=whole(0, LARGEST_SIDE),
        help="width in pixels at which the model sees the image, 0 for its own (default: as trained)",
    )
    add("--policy", default="auto", choices=AUTO_POLICIES, help="how sizes are made to fit")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--dtype", default="auto", choices=DTYPES, help="default bfloat16, float32 for the tiny models")
    add("--offload", action="store_true", help="keep model parts in main memory until used (small GPUs)")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Request:
    """A checked command: nothing in it can fail any more except the model itself."""

    image: Tensor
    instruction: str
    engine: str
    folder: str
    tiny: dict[str, Any] | None
    mask: Tensor | None
    further: tuple[Tensor, ...]
    loras: tuple[tuple[Any, float], ...]
    panel_width: int | None
    sizing: str
    guidance: float
    sampling: Any


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check everything, edit, and write the result and both side by side.

    Raises ValueError or FileNotFoundError in one sentence, before a model is loaded.
    """
    request, found = check(args), {}
    judged = best_of.noting(request.sampling.best_of, args.seed, found)
    request = replace(request, sampling=replace(request.sampling, best_of=judged))
    if request.tiny is not None:
        _say_what_tiny_is(request.tiny)
    print(f"the model sees the image, {request.sizing}")
    quiet()
    with Stop("stopped before the image was made: nothing was written"):
        denoiser = load(request, args)
        handles = _apply_loras(denoiser, request)
        edited = _edit(denoiser, request, handles, args)
    before, after = request.image[0], edited[0]
    output = images.save(images.to_pil(after), args.output)
    beside = images.side_by_side_path(output)
    beside = images.save(images.side_by_side(before, after, request.instruction), beside)
    print(f"wrote {output} and {beside}")
    made = {"image": output, "side_by_side": beside, "engine": request.engine, "model": request.folder}
    made |= {"instruction": request.instruction, "steps": request.sampling.steps}
    return made | {"guidance": request.guidance, "seed": args.seed} | found


def check(args: argparse.Namespace) -> Request:
    """Read and check every input. Raises ValueError or FileNotFoundError in one sentence."""
    from ..models import diptych, editing
    from ..models.flux import check_folder
    from ..models.flux_fill import FluxFill
    from ..models.flux_kontext import FluxKontext
    from ..models.pixels import binarise
    from ..samplers.rules import resolve_eta

    images.check_writable(args.output)
    tiny = None if args.model else _tiny_card()
    engine = args.engine or engine_of(args.model)
    kind = FluxFill if engine == "fill" else FluxKontext
    folder = args.model or str(_tiny_folder() / engine)
    check_folder(folder, "transformer", kind.in_channels, kind.name)
    sampling = editing.Sampling(
        steps=args.steps or (tiny or {}).get("steps") or 28, seed=args.seed, rule=args.rule, eta=args.eta
    )
    resolve_eta(args.rule, args.eta)

    image, instruction = _image_and_instruction(args.image, args.instruction)
    images.check_writable(args.output, image)
    mask = images.load_mask(args.mask) if args.mask else None
    if mask is not None and not binarise(mask).any():
        raise ValueError(
            f"mask {args.mask} is empty, nowhere as white as 0.5: paint what to edit white, or leave it out"
        )
    further = tuple(images.load_image(path) for path in args.reference)
    _check_engine_options(args, engine)
    check_device(args.device)
    panel_width = args.panel_width
    if panel_width is None:
        panel_width = tiny["panel"] if tiny else diptych.PANEL_WIDTH if engine == "fill" else None
    if engine == "fill":
        sized = diptych.build(image, instruction, edit_mask=mask, panel_width=panel_width, policy=args.policy)
        layout = sized.layout
    else:
        views = [editing.kontext_reference(view, args.policy, panel_width) for view in (image, *further)]
        layout = views[0][1]
    sampling = replace(
        sampling, best_of=best_of.check(args, sampling.steps, instruction, image, layout, tiny is not None)
    )
    default = editing.ICEDIT_GUIDANCE if engine == "fill" else editing.KONTEXT_GUIDANCE
    guidance = (
        args.guidance if args.guidance is not None else (tiny or {}).get("guidance", {}).get(engine, default)
    )
    chosen = [loras.read(text, args.lora_strength) for text in args.lora or _tiny_loras(tiny, engine)]
    return Request(
        image=image,
        instruction=instruction,
        engine=engine,
        folder=folder,
        tiny=tiny,
        mask=mask,
        further=further,
        loras=tuple(chosen),
        panel_width=panel_width,
        sizing=str(layout),
        guidance=guidance,
        sampling=sampling,
    )


def _check_engine_options(args: argparse.Namespace, engine: str) -> None:
    """Raise ValueError for an option that does nothing with this engine."""
    for option, given, needs in (
        ("--mask", bool(args.mask), "fill"),
        ("--reference", bool(args.reference), "kontext"),
        ("--negative", args.negative is not None, "kontext"),
        ("--cfg", args.cfg != 1.0, "kontext"),
    ):
        if given and engine != needs:
            raise ValueError(f"{option} works with --engine {needs} only: leave it out or change the engine")
    if args.negative is not None and args.cfg == 1.0:
        raise ValueError("--negative does nothing at --cfg 1: add a scale, such as --cfg 2.5")


def _image_and_instruction(image: str | None, instruction: str | None) -> tuple[Tensor, str]:
    """Both, drawing a demo image where none is named. One argument that is no file is the instruction."""
    if image is not None and instruction is None:
        if Path(image).exists():
            raise ValueError(f'an instruction is missing: write it after the image, "{image}" "make it red"')
        if looks_like_image(image):
            raise FileNotFoundError(f"image {image} does not exist: check the path")
        image, instruction = None, image
    if instruction is not None and not instruction.strip():
        raise ValueError("the instruction is empty: say what to change")
    if image is not None:
        return images.load_image(image), instruction
    from ..training.tiny.shapes import edit_pairs

    pair = next(edit_pairs(DEMO_EXAMPLE, 1, "test"))
    return pair.source[None], instruction or pair.instruction


def engine_of(model: str | None) -> str:
    """By the input channels of a local folder, else by the name of a hub id."""
    if model is None:
        return "fill"
    from ..models.flux import read_config

    config = Path(model) / "transformer" / "config.json"
    if config.is_file():
        return "kontext" if read_config(config).get("in_channels") == 64 else "fill"
    return "kontext" if "kontext" in model.lower() else "fill"


def _tiny_folder() -> Path:
    from ..models import tiny

    folder = tiny.folder()
    if not folder.is_dir():
        raise FileNotFoundError(f"the bundled tiny models are missing from {folder}: name one with --model")
    return folder


def _tiny_card() -> dict[str, Any]:
    from ..models import tiny
    from ..models.tiny import build

    _tiny_folder()
    return {"panel": build.PANEL, **tiny.card()}


def _tiny_loras(card: dict[str, Any] | None, engine: str) -> list[str]:
    """The bundled LoRA that makes an editor of the tiny model, unless the user chose LoRAs."""
    names = (card or {}).get("default_loras", {}).get(engine, [])
    return [str(_tiny_folder() / "loras" / name) for name in names]


def _say_what_tiny_is(card: dict[str, Any]) -> None:
    if card.get("trained"):
        print("bundled tiny model: it knows small images of coloured shapes; --model names a real one")
    else:
        print(
            "bundled tiny model: UNTRAINED random weights, the result will be noise; --model names a real one"
        )


def load(request: Request, args: argparse.Namespace) -> Any:
    """The denoiser that a request asks for. Raises ValueError where its files are missing or damaged."""
    import torch

    from ..models.flux_fill import FluxFill
    from ..models.flux_kontext import FluxKontext

    name = args.dtype if args.dtype != "auto" else "float32" if request.tiny else "bfloat16"
    kind = FluxFill if request.engine == "fill" else FluxKontext
    device = args.device or ("cpu" if request.tiny else None)
    try:
        return kind.load(request.folder, getattr(torch, name), device, offload=args.offload)
    except OSError as error:  # not downloaded, not allowed, or damaged
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model {request.folder} cannot be loaded ({reason}): see diptych doctor") from error


def _apply_loras(denoiser: Any, request: Request) -> list[Any]:
    handles = loras.apply(denoiser.transformer, request.loras)
    for handle in handles:
        print(handle.report)
    return handles


def _edit(denoiser: Any, request: Request, handles: list[Any], args: argparse.Namespace) -> Tensor:
    with Bar(f"editing ({request.engine})", best_of.evaluations(request.sampling)) as bar:
        return sample(denoiser, request, handles, args, lambda state: bar.advance(len(state["x"])))


def sample(
    denoiser: Any,
    request: Request,
    handles: list[Any],
    args: argparse.Namespace,
    callback: Callable[[dict[str, Any]], Any],
) -> Tensor:
    """The edited image [1,H,W,C]; `callback` is told of every step, whose `x` has an item per candidate."""
    from ..models import editing

    sampling = replace(request.sampling, callback=callback, at_sigma=loras.follow(handles))
    common = {"panel_width": request.panel_width, "policy": args.policy, "guidance": request.guidance}
    common["sampling"] = sampling
    image, instruction = request.image, request.instruction
    if request.engine == "fill":
        return editing.edit_with_fill(denoiser, image, instruction, edit_mask=request.mask, **common).image
    return editing.edit_with_kontext(
        denoiser,
        image,
        instruction,
        further=request.further,
        negative=args.negative if args.cfg == 1.0 else args.negative or "",
        cfg=args.cfg,
        **common,
    ).image
