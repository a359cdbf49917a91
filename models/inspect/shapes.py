"""One model call told stage by stage: its data, its report and its image.

`flux_shapes.py` and `unet_shapes.py` work the stages out; nothing is run for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from . import drawing

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # of weights, by name
PREFIXES = ("model.diffusion_model.", "diffusion_model.")


@dataclass(frozen=True)
class Call:
    """What goes into one model call: latents [batch, channels, height, width] and a text sequence.

    references: (height, width) in latent cells of each reference image; method: how ComfyUI places them.
    """

    batch: int
    channels: int
    height: int
    width: int
    text_tokens: int
    text_width: int
    references: tuple[Shape, ...] = ()
    method: str = "offset"


@dataclass(frozen=True)
class Stage:
    """What comes out at one place; `modules` are the parts of the model that give exactly these shapes."""

    name: str
    shapes: tuple[Shape, ...]
    note: str = ""
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attention:
    """Equal attention layers: how many, queries and keys of each, width of all heads, and heads if known."""

    name: str
    layers: int
    queries: int
    keys: int
    width: int
    heads: int | None = None

    def flops(self, batch: int) -> int:
        """Of all these layers: two products of queries x keys x width, a multiply and an add each."""
        return 4 * batch * self.layers * self.queries * self.keys * self.width

    def scores(self, batch: int) -> int | None:
        """Numbers in one layer's attention matrix, held only by attention that is not fused."""
        return None if self.heads is None else batch * self.heads * self.queries * self.keys


@dataclass(frozen=True)
class Walk:
    """A whole call: what kind of model it is, its stages and its attention."""

    kind: str
    call: Call
    stages: tuple[Stage, ...]
    attention: tuple[Attention, ...]
    linear_flops: int | None = None
    weight_bytes: int = 0

    @property
    def attention_flops(self) -> int:
        """Floating point operations of all attention products of the call (a multiply-add counts as two)."""
        return sum(layer.flops(self.call.batch) for layer in self.attention)


def weights(state_dict: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The shape of each weight of a diffusion model, prefixes of whole checkpoints removed."""
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in state_dict)), "")
    return {n.removeprefix(prefix): tuple(t.shape) for n, t in state_dict.items() if n.startswith(prefix)}


def count(shapes: Shapes, prefix: str) -> int:
    """How many numbered parts `prefix.0`, `prefix.1`, ... there are."""
    found = {n[len(prefix) + 1 :].partition(".")[0] for n in shapes if n.startswith(f"{prefix}.")}
    return sum(part.isdigit() for part in found)


def check_text(call: Call, width: int) -> None:
    """Raise ValueError if the text is of another width than the model takes."""
    if call.text_width != width:
        raise ValueError(
            f"conditioning has text of width {call.text_width}, but this model takes {width}: "
            f"encode the prompt with the model's own text encoders."
        )


def amount(value: float, unit: str) -> str:
    """A number with a decimal prefix: 1.23 TFLOP."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or prefix == "T":
            return f"{value:.4g} {prefix}{unit}"
        value /= 1000
    raise AssertionError


def facts(walk: Walk) -> list[str]:
    """What the call costs, in sentences."""
    batch, found = walk.call.batch, []
    for layer in walk.attention:
        line = f"{layer.name}: {layer.layers} x {layer.queries} queries on {layer.keys} keys, "
        line += f"width {layer.width}, {amount(layer.flops(batch), 'FLOP')}"
        if (scores := layer.scores(batch)) is not None:
            line += (
                f"; one attention matrix of {layer.heads} heads would be {amount(2 * scores, 'B')} in 16 bit"
            )
        found.append(line)
    found.append(f"attention of one call: {amount(walk.attention_flops, 'FLOP')}")
    if walk.linear_flops is not None:
        found.append(f"linear layers of one call: {amount(walk.linear_flops, 'FLOP')}")
    if walk.weight_bytes:
        found.append(f"weights: {amount(walk.weight_bytes, 'B')} as loaded")
    return found


def _written(shapes: Sequence[Shape]) -> str:
    return "  ".join("[" + ", ".join(map(str, shape)) + "]" for shape in shapes)


def report(walk: Walk) -> str:
    """The walk as text, a line for each stage and what it costs."""
    lines = [walk.kind]
    for stage in walk.stages:
        lines.append(f"  {stage.name}: {_written(stage.shapes)}{'  ' + stage.note if stage.note else ''}")
    return "\n".join(lines + facts(walk))


def image(walk: Walk) -> Tensor:
    """The walk as IMAGE [1,H,960,3]."""
    rows = [("stage", "shape", "")]
    rows += [(stage.name, _written(stage.shapes), stage.note) for stage in walk.stages]
    return drawing.stacked(
        [
            drawing.words(walk.kind, 17, drawing.BLUE),
            drawing.table(rows, (220, 260, 456)),
            drawing.words("What one call costs", 15, drawing.BLUE),
            drawing.words("\n".join(facts(walk)), 13),
        ]
    )
