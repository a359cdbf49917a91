"""What `diptych outpaint` and `diptych inpaint` share: choosing the model, painting a canvas, writing files.

Everything that can be wrong with the input is found before a model is loaded. The canvas is
`models/outpaint/`, the sampling `models/editing.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import images
from .progress import Bar, quiet
from .stopping import Stop
from .values import check_device, finite, seed, steps, whole

if TYPE_CHECKING:
    from ..models.outpaint import Paint, Piece

DTYPES = ("auto", "float32", "bfloat16", "float16")
ENGINES = {"fill": 16, "sd_inpaint": 8, "glid": 8, "sd": 8}  # and what the sides of its images divide by
SIZES = {"fill": 1024, "sd_inpaint": 512, "glid": 512, "sd": 512}  # pixels a side that it was trained at
STEPS = {"fill": 28, "sd_inpaint": 50, "glid": 50, "sd": 50}
PARTS = {  # the part that denoises, and its channels
    "fill": ("transformer", 384),
    "sd_inpaint": ("unet", 9),
    "glid": ("unet", 8),
    "sd": ("unet", 4),
}
NAMES = {
    "fill": "FLUX.1 Fill",
    "sd_inpaint": "SD inpainting",
    "glid": "glid",
    "sd": "Stable Diffusion",
}
DIFFUSION = ("guidance", "offload")  # options that only Fill has
OTHERS = {  # options that an engine does not have
    "fill": ("negative", "cfg", "sampler", "plain_cfg"),
    "sd_inpaint": (*DIFFUSION, "sampler", "plain_cfg"),
    "glid": DIFFUSION,
    "sd": (*DIFFUSION, "sampler", "plain_cfg"),
}


def add_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Add what `inpaint` and `outpaint` share; `output` is the default file."""
    add = parser.add_argument
    add("-o", "--output", type=Path, default=Path(output), metavar="OUT.png", help=f"default {output}")
    add(
        "--engine",
        choices=ENGINES,
        help="FLUX Fill, SD inpainting, glid-3-xl-stable, or plain SD (default: by the model)",
    )
    add("--model", metavar="DIR_OR_HUB_ID", help="diffusers folder or Hugging Face id (default: bundled)")
    add("--steps", type=steps, help="sampling steps (default 28 for fill, 50 for the others)")
    add("--guidance", type=finite, help="fill: embedded guidance (default 30)")
    add("--negative", default="", help="all but fill: negative prompt")
    add("--cfg", type=finite, help="all but fill: scale against the negative prompt (default 7.5, glid 7)")
    add(
        "--sampler", choices=("plms", "ddim"), help="glid: plms (default), or ddim with steps such as 50, 250"
    )
    add("--plain-cfg", action="store_true", help="glid: guide all four latent channels, not the first three")
    add("--seed", type=seed, default=0, help="of the noise (default 0)")
    add("--feather", type=whole(0, 4096), default=0, help="px of known image over which the seam fades")
    add("--keep-colours", action="store_true", help="do not match the new part's colours to the image")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--dtype", default="auto", choices=DTYPES, help="default bfloat16, float32 for the tiny models")
    add("--offload", action="store_true", help="fill: keep model parts in main memory until used")


@dataclass(frozen=True)
class Engine:
    """A checked choice of model: `folder` is a diffusers folder or hub id, `tiny` the bundled ones' card."""

    name: str
    folder: str
    tiny: dict[str, Any] | None

    @property
    def multiple(self) -> int:
        """What both sides of its images divide by, in pixels."""
        return ENGINES[self.name]

    @property
    def size(self) -> int:
        """Pixels a side that it was trained at."""
        return self.tiny["panel"] if self.tiny else SIZES[self.name]


def check_engine(args: argparse.Namespace) -> Engine:
    """Raises ValueError or FileNotFoundError in one sentence for options that no model can follow."""
    from ..models import tiny
    from ..models.flux import check_folder

    images.check_writable(args.output)
    check_device(args.device)
    name = args.engine or engine_of(args.model)
    for option in OTHERS[name]:
        if getattr(args, option) not in (None, "", False):
            raise ValueError(f"--{option.replace('_', '-')} does nothing with --engine {name}: leave it out")
    card = None
    if not args.model:
        if name == "sd":
            raise ValueError("--engine sd has no bundled model: give --model")
        from ..models.tiny import build

        card = {"panel": build.PANEL, **tiny.card()}
    folder = args.model or str(tiny.folder() / name)
    if not args.model and not Path(folder).is_dir():
        raise ValueError(f"no tiny {name} model is bundled: give a folder with --model")
    check_folder(folder, *PARTS[name], NAMES[name])
    return Engine(name, folder, card)


def engine_of(model: str | None) -> str:
    """By the folder: a UNet is Stable Diffusion's; else by the name of a hub id."""
    if model is None or not Path(model).is_dir():
        return (
            "sd_inpaint" if model and "inpaint" in model.lower() and "flux" not in model.lower() else "fill"
        )
    unet = Path(model) / "unet" / "config.json"
    if not unet.is_file():
        return "fill"
    from ..models.flux import read_config

    channels = read_config(unet).get("in_channels")
    return next((name for name in ("glid", "sd") if PARTS[name][1] == channels), "sd_inpaint")


def check_prompt(prompt: str) -> str:
    """The prompt without blanks around it. Raises ValueError for an empty one."""
    if not prompt.strip():
        raise ValueError("the prompt is empty: describe the whole finished image")
    return prompt.strip()


def paint(
    engine: Engine,
    canvas: Tensor,
    mask: Tensor,
    prompt: str,
    args: argparse.Namespace,
    words: Callable[[Any], tuple] | None = None,
    **options: Any,
) -> Tensor:
    """The canvas [1,H,W,3] with its hole [1,H,W] painted; loads the model and shows its progress.

    options: more of the engine's own function in `models/`; words: given the loaded model, its
    encoded prompt and negative prompt.
    """
    announce(engine)
    print(f"the model sees a canvas of {canvas.shape[2]} x {canvas.shape[1]}")
    with Stop("stopped before the image was made: nothing was written"):
        denoiser = load(engine, args)
        if words is not None:
            prompt, options["negative"] = words(denoiser)
        with Bar(f"painting ({engine.name})", steps_of(engine, args)) as bar:
            return sample(denoiser, engine, canvas, mask, prompt, args, lambda _: bar.advance(), **options)


def sample(
    denoiser: Any,
    engine: Engine,
    canvas: Tensor,
    mask: Tensor,
    prompt: Any,
    args: argparse.Namespace,
    callback: Callable[[dict[str, Any]], Any],
    **options: Any,
) -> Tensor:
    """The canvas [1,H,W,3] with its hole [1,H,W] painted by a loaded model; `callback` is told of every step.

    options: more of the engine's own function in `models/`.
    """
    from ..models import editing
    from ..models.outpaint import Piece
    from ..models.repaint import Painter
    from ..models.sd_blend import inpaint_blend

    sampling = editing.Sampling(steps=steps_of(engine, args), seed=args.seed, callback=callback)
    how = guidance_of(engine, args) | {"sampling": sampling, **options}
    if engine.name == "fill":
        return editing.fill_canvas(denoiser, canvas, mask, prompt, **how)
    if engine.name == "glid":
        return Painter(denoiser, prompt, **how)(Piece(canvas, mask))
    if engine.name == "sd":
        return inpaint_blend(denoiser, canvas, mask, prompt, **how)
    return editing.inpaint_sd(denoiser, canvas, mask, prompt, **how)


def work(
    engine: Engine,
    prompt: str,
    args: argparse.Namespace,
    enlarge: Callable[[Paint], Tensor],
    denoise: float = 1.0,
) -> Tensor:
    """What `enlarge` makes with a painter of pieces; loads the model and shows the progress of each piece."""
    announce(engine)
    with Stop("stopped before the image was made: nothing was written"):
        denoiser = load(engine, args)
        with Bar(f"painting ({engine.name})") as bar:

            def step(state: dict[str, Any]) -> None:
                bar.advance()

            return enlarge(painter(denoiser, engine, prompt, args, step, bar.more, denoise))


def painter(
    denoiser: Any,
    engine: Engine,
    prompt: str,
    args: argparse.Namespace,
    callback: Callable[[dict[str, Any]], Any],
    more: Callable[[int], Any],
    denoise: float = 1.0,
) -> Paint:
    """A painter of pieces on a loaded model: `callback` is told of every step, `more` of steps to come."""
    from ..models import editing
    from ..models.repaint import Painter

    count = steps_of(engine, args)
    sampling = editing.Sampling(steps=count, seed=args.seed, callback=callback)
    how = guidance_of(engine, args)
    made = Painter(denoiser, prompt, sampling, denoise, on_tile=lambda *_: more(count), **how)

    def paint(piece: Piece) -> Tensor:
        if piece.window is None:
            more(count)
        return made(piece)

    return paint


def announce(engine: Engine) -> None:
    """Say what paints, if it is only a tiny model, and silence the libraries."""
    if engine.tiny is not None:
        print("bundled tiny model: it knows small images of coloured shapes; --model names a real one")
    quiet()


def steps_of(engine: Engine, args: argparse.Namespace) -> int:
    """How many steps a piece takes."""
    return args.steps or (engine.tiny or {}).get("steps") or STEPS[engine.name]


def guidance_of(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """How strongly the prompt counts, in the engine's own way."""
    from ..models import editing

    if engine.name == "fill":
        usual = (engine.tiny or {}).get("guidance", {}).get("fill", editing.FILL_GUIDANCE)
        return {"guidance": usual if args.guidance is None else args.guidance}
    usual = 2.5 if engine.tiny else {"glid": 7.0}.get(engine.name, 7.5)
    how = {"negative": args.negative, "cfg": usual if args.cfg is None else args.cfg}
    return how | ({"sampler": args.sampler or "plms"} if engine.name == "glid" else {})


def load(engine: Engine, args: argparse.Namespace) -> Any:
    """The engine's denoiser. Raises ValueError where its files are missing or damaged."""
    import torch

    from ..models.flux_fill import FluxFill
    from ..models.glid.model import Glid
    from ..models.sd_blend import SDBlend
    from ..models.sd_inpaint import SDInpaint

    name = args.dtype if args.dtype != "auto" else "float32" if engine.tiny else "bfloat16"
    device = args.device or ("cpu" if engine.tiny else None)
    try:
        if engine.name == "fill":
            return FluxFill.load(engine.folder, getattr(torch, name), device, offload=args.offload)
        if engine.name == "sd":
            return SDBlend.load(
                engine.folder, getattr(torch, name), device, getattr(args, "controlnet", None)
            )
        kind = Glid if engine.name == "glid" else SDInpaint
        denoiser = kind.load(engine.folder, getattr(torch, name), device)
        if args.plain_cfg:
            denoiser.glid_cfg = False
        return denoiser
    except OSError as error:  # not downloaded, not allowed, or damaged
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model {engine.folder} cannot be loaded ({reason}): see diptych doctor") from error


def save(
    before: Tensor, after: Tensor, prompt: str, args: argparse.Namespace, engine: Engine
) -> dict[str, Any]:
    """Write the image [1,H,W,C], and beside it before and after in one; returns what a command answers."""
    output = args.output
    place = images.save(images.to_pil(after[0]), output)
    sheet = images.side_by_side(before[0], after[0], prompt)
    beside = images.save(sheet, images.side_by_side_path(place))
    print(f"wrote {place} and {beside}")
    made = {"image": place, "side_by_side": beside, "engine": engine.name, "model": engine.folder}
    made |= {"prompt": prompt, "steps": steps_of(engine, args), "seed": args.seed}
    return made | {"width": after.shape[2], "height": after.shape[1]}
