"""A FLUX transformer's call, stage by stage, from the shapes of its weights.

Knows the names of the original checkpoints, which ComfyUI uses, and those of diffusers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..flux_kontext import reference_positions
from .shapes import Attention, Call, Shape, Shapes, Stage, Walk, check_text, count

PATCH = 2  # latent cells per token and side
NAMES = {  # part: its name in ComfyUI, in diffusers
    "image_in": ("img_in", "x_embedder"),
    "text_in": ("txt_in", "context_embedder"),
    "vector": ("time_in", "time_text_embed"),
    "double": ("double_blocks", "transformer_blocks"),
    "single": ("single_blocks", "single_transformer_blocks"),
    "out": ("final_layer", "proj_out"),
}
HEAD = ("double_blocks.0.img_attn.norm.query_norm.", "transformer_blocks.0.attn.norm_q.")
ONCE = ("mod", "time", "vector", "guidance", "norm", "adaLN")  # layers that run once a sample
TEXT = ("txt", "context", "attn.add_", "to_add_out")


@dataclass(frozen=True)
class FluxSizes:
    """What the weights say of a FLUX transformer; channels are per token (2 x 2 latent cells)."""

    channels_in: int
    channels_out: int
    hidden: int
    head: int
    double: int
    single: int
    text_width: int
    guidance: bool
    layout: int  # 0 ComfyUI's names, 1 diffusers'


def is_flux(shapes: Shapes) -> bool:
    """Whether these are weights of a FLUX transformer."""
    return any(f"{NAMES['image_in'][k]}.weight" in shapes and _head(shapes, k) for k in (0, 1))


def _head(shapes: Shapes, layout: int) -> int | None:
    found = [shapes.get(HEAD[layout] + end) for end in ("scale", "weight")]
    return next((shape[-1] for shape in found if shape), None)


def sizes(shapes: Shapes) -> FluxSizes:
    """The sizes of a FLUX transformer. Raises KeyError for weights of something else (see `is_flux`)."""
    layout = 0 if "img_in.weight" in shapes else 1
    name = {part: names[layout] for part, names in NAMES.items()}
    hidden, channels_in = shapes[f"{name['image_in']}.weight"]
    out = f"{name['out']}.linear.weight" if layout == 0 else f"{name['out']}.weight"
    return FluxSizes(
        channels_in=channels_in,
        channels_out=shapes[out][0],
        hidden=hidden,
        head=_head(shapes, layout),
        double=count(shapes, name["double"]),
        single=count(shapes, name["single"]),
        text_width=shapes[f"{name['text_in']}.weight"][1],
        guidance=any(n.startswith(("guidance_in.", "time_text_embed.guidance_embedder.")) for n in shapes),
        layout=layout,
    )


def token_size(height: int, width: int) -> Shape:
    """(rows, columns) of tokens; an odd side is padded."""
    return math.ceil(height / PATCH), math.ceil(width / PATCH)


def walk(shapes: Shapes, call: Call, weight_bytes: int = 0, told: str = "") -> Walk:
    """The stages of one call. told: a note on the joined channels, such as "mask not connected: zeros".

    Raises ValueError for text of another width than the model takes.
    """
    size = sizes(shapes)
    check_text(call, size.text_width)
    rows, columns = token_size(call.height, call.width)
    grids = [token_size(*reference) for reference in call.references]
    noisy, known = rows * columns, [h * w for h, w in grids]
    image, text = noisy + sum(known), call.text_tokens
    stages = [
        *_inputs(size, call, (rows, columns), known, told),
        *_ids(call, (rows, columns), grids),
        *_blocks(size, call.batch, image, text),
        Stage(
            "result",
            ((call.batch, size.channels_out // PATCH**2, call.height, call.width),),
            f"the first {noisy} tokens, unpacked: the velocity"
            + (f"; {sum(known)} reference tokens are dropped" if known else ""),
        ),
    ]
    attention = Attention(
        f"joint attention of {size.double} double and {size.single} single blocks",
        size.double + size.single,
        text + image,
        text + image,
        size.hidden,
        size.hidden // size.head,
    )
    flops = linear_flops(shapes, call.batch, image, text)
    return Walk(_kind(size, call), call, tuple(stages), (attention,), flops, weight_bytes)


def _kind(size: FluxSizes, call: Call) -> str:
    extra = size.channels_in // PATCH**2 - call.channels
    blocks = f"{size.double} double + {size.single} single blocks, {size.hidden} wide, "
    blocks += f"{size.hidden // size.head} heads of {size.head}"
    if extra > call.channels:
        return f"FLUX Fill: known image and mask join the channels ({blocks})"
    if extra > 0:
        return f"FLUX with a control image in further channels ({blocks})"
    if call.references:
        return f"FLUX Kontext: references join the sequence ({blocks})"
    return f"FLUX, nothing but text joins the noise ({blocks})"


def _inputs(size: FluxSizes, call: Call, grid: Shape, known: list[int], told: str) -> list[Stage]:
    b, (rows, columns) = call.batch, grid
    stages = [Stage("noisy latents", ((b, call.channels, call.height, call.width),), "8 pixels to a cell")]
    joined = size.channels_in // PATCH**2
    if joined > call.channels:
        mask = joined - 2 * call.channels
        note = f"channel concat: {call.channels} noisy + {call.channels} known"
        note += f" + {mask} of the mask (8 x 8 pixels)" if mask else ""
        note += f"; {told}" if told else ""
        stages.append(Stage("joined channels", ((b, joined, call.height, call.width),), note))
    stages.append(
        Stage(
            "packed tokens",
            ((b, rows * columns, size.channels_in),),
            f"2 x 2 cells a token, {rows} rows of {columns}",
        )
    )
    if known:
        shapes = tuple((b, tokens, size.channels_in) for tokens in known)
        stages.append(Stage("reference tokens", shapes, "sequence concat: they follow the noisy tokens"))
    stages.append(Stage("text", ((b, call.text_tokens, call.text_width),), "T5's sequence, padding included"))
    return stages


def _ids(call: Call, grid: Shape, grids: list[Shape]) -> list[Stage]:
    """Position ids [tokens, 3] of (index, row, column): text all zero."""
    stages = [Stage("ids of text", ((call.text_tokens, 3),), "all (0, 0, 0)")]
    rows, columns = grid
    note = f"(0, 0, 0) to (0, {rows - 1}, {columns - 1})"
    stages.append(Stage("ids of noisy tokens", ((rows * columns, 3),), note))
    for k, (h, w) in enumerate(grids):
        i, top, left = positions(call.method, grid, grids)[k]
        note = f"({i}, {top}, {left}) to ({i}, {top + h - 1}, {left + w - 1})"
        stages.append(Stage(f"ids of reference {k + 1}", ((h * w, 3),), note))
    return stages


def positions(method: str, grid: Shape, grids: list[Shape]) -> list[tuple[int, int, int]]:
    """(index, row, column) of each reference's first token, for each of ComfyUI's methods.

    uxo: index 0, each further down and right than the image and the references before. Others: see
    `flux_kontext.reference_positions`.
    """
    if method == "uxo":
        found, row, column = [], *grid
        for h, w in grids:
            found.append((0, row, column))
            row, column = row + h, column + w
        return found
    return reference_positions(grids, "index" if method.startswith("index") else "offset")


def _blocks(size: FluxSizes, batch: int, image: int, text: int) -> list[Stage]:
    name = {part: names[size.layout] for part, names in NAMES.items()}
    hidden, both = size.hidden, (batch, text + image, size.hidden)
    doubles = tuple(f"{name['double']}.{i}" for i in range(size.double))
    # diffusers gives back text and image apart after each single block, ComfyUI the one sequence
    singles = tuple(f"{name['single']}.{i}" for i in range(size.single))
    wider = f"{size.channels_in} -> {hidden}", f"{size.text_width} -> {hidden}"
    vector = "timestep, pooled CLIP" + (", guidance" if size.guidance else "")
    vector += ": scales, shifts and gates of every block"
    return [
        Stage("image tokens embedded", ((batch, image, hidden),), wider[0], (name["image_in"],)),
        Stage("text tokens embedded", ((batch, text, hidden),), wider[1], (name["text_in"],)),
        Stage("modulation vector", ((batch, hidden),), vector, (name["vector"],)),
        Stage(
            f"{size.double} double blocks",
            ((batch, image, hidden), (batch, text, hidden)),
            "image and text: own weights, one attention over both",
            doubles,
        ),
        Stage(f"{size.single} single blocks", (both,), "text + image as one sequence", singles),
        Stage("last layer", ((batch, image, size.channels_out),), "text is dropped", (name["out"],)),
    ]


def linear_flops(shapes: Shapes, batch: int, image: int, text: int) -> int:
    """Operations of all linear layers: 2 x weights x rows, rows being the tokens that a layer sees."""
    total = 0
    for name, shape in shapes.items():
        if not name.endswith("weight") or len(shape) != 2:
            continue
        if any(word in name for word in ONCE):
            rows = 1
        elif name.startswith("single"):
            rows = text + image
        else:
            rows = text if any(word in name for word in TEXT) else image
        total += 2 * batch * rows * math.prod(shape)
    return total
