"""A Stable Diffusion UNet's call, stage by stage, from the shapes of its weights.

Knows the names of the original checkpoints (input_blocks, ...), which ComfyUI uses, and those of diffusers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .shapes import Attention, Call, Shape, Shapes, Stage, Walk, check_text

SELF = re.compile(r"attn1\.to_q\.weight$")
ORIGINAL, DIFFUSERS = "input_blocks.0.0", "conv_in"


@dataclass(frozen=True)
class Part:
    """One step through the UNet: its channels, the widths of its attention layers, where the size changes."""

    name: str
    channels: int
    attention: tuple[tuple[str, int], ...]  # name and width of each
    down: bool = False
    up: bool = False


def is_unet(shapes: Shapes) -> bool:
    """Whether these are weights of a Stable Diffusion UNet with text in its attention."""
    known = f"{ORIGINAL}.weight" in shapes or f"{DIFFUSERS}.weight" in shapes
    return known and any("attn2.to_k.weight" in name for name in shapes)


def parts(shapes: Shapes) -> list[Part]:
    """The parts in the order in which they run, the first convolution left out."""
    original = f"{ORIGINAL}.weight" in shapes
    names = (
        ("input_blocks", "middle_block", "output_blocks")
        if original
        else ("down_blocks", "mid_block", "up_blocks")
    )
    found = []
    for group in names:
        if group.startswith("mid"):
            found.append(_part(shapes, group))
        else:
            pattern = re.compile(rf"{group}\.(\d+)\.")
            numbers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
            numbers -= {0} if group == "input_blocks" else set()
            found += [_part(shapes, f"{group}.{k}") for k in sorted(numbers)]
    return found


def _part(shapes: Shapes, name: str) -> Part:
    own = {n[len(name) + 1 :]: shape for n, shape in shapes.items() if n.startswith(f"{name}.")}
    attention = tuple(
        (f"{name}.{n[: -len('.to_q.weight')]}", shape[0]) for n, shape in own.items() if SELF.search(n)
    )
    ends = [shape[0] for n, shape in own.items() if re.search(r"(out_layers\.3|conv2|\bop)\.weight$", n)]
    down = any(re.search(r"^0\.op\.|^downsamplers\.", n) for n in own)
    up = any(re.search(r"^[12]\.conv\.|^upsamplers\.", n) for n in own)
    return Part(name, ends[-1], attention, down, up)


def walk(
    shapes: Shapes, call: Call, weight_bytes: int = 0, heads: Mapping[str, int] | None = None, told: str = ""
) -> Walk:
    """The stages of one call. heads: of each self-attention by module name, where the model tells them.

    Raises ValueError for text of another width than the model takes.
    """
    first = ORIGINAL if f"{ORIGINAL}.weight" in shapes else DIFFUSERS
    last = "out.2" if first == ORIGINAL else "conv_out"
    width, channels = shapes[f"{first}.weight"][:2]
    check_text(call, next(s[1] for n, s in shapes.items() if "attn2.to_k.weight" in n))
    size = (call.height, call.width)
    stages = [
        Stage("noisy latents", ((call.batch, call.channels, *size),), "8 pixels to a cell"),
        *_joined(call, channels, told),
        Stage("text", ((call.batch, call.text_tokens, call.text_width),), "read by every cross-attention"),
        Stage("first convolution", ((call.batch, width, *size),), f"{channels} -> {width}", (first,)),
    ]
    layers: Counter = Counter()
    earlier: list[Shape] = []
    for part in parts(shapes):
        if part.attention:
            layers[size, part.attention[0][1], (heads or {}).get(part.attention[0][0])] += len(part.attention)
        if part.down:
            earlier.append(size)
            size = tuple(math.ceil(side / 2) for side in size)
        elif part.up:
            size = earlier.pop()
        note = f"{len(part.attention)} self- and cross-attention" if part.attention else ""
        stages.append(Stage(part.name, ((call.batch, part.channels, *size),), note, (part.name,)))
    out = (call.batch, shapes[f"{last}.weight"][0], *size)
    stages.append(Stage("result", (out,), "the noise (epsilon) or velocity", (last,)))
    return Walk(_kind(call, channels), call, tuple(stages), _attention(layers, call), None, weight_bytes)


def _attention(layers: Mapping[tuple, int], call: Call) -> tuple[Attention, ...]:
    """Equal layers together. layers: how many there are of each (size, width, heads)."""
    found = []
    for (size, width, heads), count in layers.items():
        cells, where = math.prod(size), f"at {size[0]} x {size[1]}"
        found.append(Attention(f"self-attention {where}", count, cells, cells, width, heads))
        found.append(Attention(f"cross-attention {where}", count, cells, call.text_tokens, width, heads))
    return tuple(found)


def _kind(call: Call, channels: int) -> str:
    extra = channels - call.channels
    if extra == call.channels + 1:
        return f"Stable Diffusion inpainting: {channels} channels in, mask and known image join the noise"
    if extra:
        return f"Stable Diffusion with {channels} channels in: an image's latents join the noise"
    return "Stable Diffusion: nothing joins the noise"


def _joined(call: Call, channels: int, told: str) -> list[Stage]:
    extra = channels - call.channels
    if not extra:
        return []
    mask = extra - call.channels
    note = f"channel concat: {call.channels} noisy{f' + {mask} mask' if mask > 0 else ''}"
    note += f" + {call.channels} known"
    note += f"; {told}" if told else ""
    return [Stage("joined channels", ((call.batch, channels, call.height, call.width),), note)]
