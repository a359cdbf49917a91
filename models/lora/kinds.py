"""Changes of a weight that do not depend on it: plain LoRA, experts, LyCORIS factors, whole tensors.

Each has `shape` (outputs, inputs) and, but for experts, `change(weight)`: the float32 change of that weight.
Factors stay in the file's dtype; every product is float32. What depends on the weight is in `based.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """Plain LoRA: weight change `scale * B A`.

    A: [rank, in] (or [rank, in, kh, kw] for a convolution); B: [out, rank] (or [out, rank, 1, 1]).
    scale_from says which fact gave the scale (see `scale.py`).
    """

    A: Tensor = field(repr=False)
    B: Tensor = field(repr=False)
    scale: float = 1.0
    scale_from: str = "given"

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def columns(self) -> int:
        """Entries of one output's row: inputs times kernel."""
        return self.A.shape[1:].numel()

    def dense(self) -> Tensor:
        """The weight change in float32: [out, in] or [out, in, kh, kw]."""
        change = self.B.float().flatten(1) @ self.A.float().flatten(1)
        return self.scale * change.reshape(self.B.shape[0], *self.A.shape[1:])

    def change(self, weight: Tensor) -> Tensor:
        """`dense()` in the weight's shape."""
        return self.dense().reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class MoeLowRank:
    """ICEdit's mixture of LoRA experts: per token, `y += sum_i g_i * scale * B_i A_i x`, g = gate(router x).

    A: [experts, rank, in]; B: [experts, out, rank]; router: [experts, in], no bias.
    gate "softmax_topk": softmax over the k kept logits (ICEdit; with k = 1 the gate is exactly 1);
    gate "softmax_all": softmax over all logits, then the k largest are kept as they are.
    Depends on the token, so it can be neither merged into a weight nor applied as a weight patch.
    """

    A: Tensor = field(repr=False)
    B: Tensor = field(repr=False)
    router: Tensor = field(repr=False)
    scale: float = 1.0
    scale_from: str = "given"
    gate: str = "softmax_topk"
    top_k: int = 1

    @property
    def rank(self) -> int:
        """Of each expert."""
        return self.A.shape[1]

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.B.shape[1], self.A.shape[2]

    @property
    def columns(self) -> int:
        """Entries of one output's row: the inputs."""
        return self.A.shape[2]


@dataclass(frozen=True, eq=False)
class Factored:
    """LyCORIS weight changes: LoKr `kron(w1, w2)` or LoHa `(w1_a w1_b) * (w2_a w2_b)`, times scale.

    factors: as the file has them. LoKr: w1 or w1_a w1_b, w2 or w2_a w2_b (with t2 the Tucker form);
    LoHa: w1_a, w1_b, w2_a, w2_b (with t1 and t2 the Tucker form).
    rows selects the part of the product that belongs to this module when the file's layer is a fused one
    (qkv, linear1); swap exchanges its row halves (the final modulation); width pads its inputs with zeros.
    """

    kind: str
    factors: Mapping[str, Tensor] = field(repr=False)
    scale: float = 1.0
    scale_from: str = "given"
    rows: tuple[int, int] | None = None
    swap: bool = False
    width: int | None = None

    @property
    def rank(self) -> int:
        """The size of the decomposed factor; of an undecomposed LoKr the rows of w1."""
        f = self.factors
        if self.kind == "lokr":
            return (
                f["w1"].shape[0] if "w1" in f and "w2" in f else f["w2_b" if "w2_b" in f else "w1_b"].shape[0]
            )
        return f["w1_b"].shape[0]

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of the whole product, before rows and width: [out, in, kernel...]."""
        f = self.factors
        if self.kind == "lokr":
            (a, b), (c, d, *kernel) = self._lokr_shapes()
            return a * c, b * d, *kernel
        if "t1" in f:
            return f["w1_a"].shape[1], f["w1_b"].shape[1], *f["t1"].shape[2:]
        return f["w1_a"].shape[0], *f["w1_b"].shape[1:]

    def _lokr_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        f = self.factors
        first = tuple(f["w1"].shape) if "w1" in f else (f["w1_a"].shape[0], f["w1_b"].shape[1])
        if "w2" in f:
            return first, tuple(f["w2"].shape)
        if "t2" in f:
            return first, (f["w2_a"].shape[1], f["w2_b"].shape[1], *f["t2"].shape[2:])
        return first, (f["w2_a"].shape[0], *f["w2_b"].shape[1:])

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of this module's part."""
        out, inputs = self.whole_shape[:2]
        return (out if self.rows is None else self.rows[1] - self.rows[0]), self.width or inputs

    @property
    def columns(self) -> int:
        """Entries of one output's row: inputs times kernel."""
        return self.shape[1] * torch.Size(self.whole_shape[2:]).numel()

    def kron_factors(self) -> tuple[Tensor, Tensor]:
        """w1 [a, b] and w2 [c, d(, kh, kw)] of a LoKr in float32, decomposed ones multiplied out."""
        f = {name: t.float() for name, t in self.factors.items()}
        w1 = f["w1"] if "w1" in f else f["w1_a"] @ f["w1_b"]
        if "w2" in f:
            return w1, f["w2"]
        if "t2" in f:
            return w1, _tucker(f["t2"], f["w2_a"], f["w2_b"])
        return w1, (f["w2_a"] @ f["w2_b"].flatten(1)).reshape(self._lokr_shapes()[1])

    def dense(self) -> Tensor:
        """The weight change in float32: [out, in] or [out, in, kh, kw]."""
        if self.kind == "lokr":
            w1, w2 = self.kron_factors()
            w1 = w1.reshape(*w1.shape, *(1,) * (w2.ndim - 2))
            change = torch.kron(w1.contiguous(), w2.contiguous())
        else:
            f = {name: t.float() for name, t in self.factors.items()}
            if "t1" in f:
                change = _tucker(f["t1"], f["w1_a"], f["w1_b"]) * _tucker(f["t2"], f["w2_a"], f["w2_b"])
            else:
                change = (f["w1_a"] @ f["w1_b"].flatten(1)) * (f["w2_a"] @ f["w2_b"].flatten(1))
                change = change.reshape(self.whole_shape)
        if self.rows is not None:
            change = change[self.rows[0] : self.rows[1]]
        if self.swap:
            change = swap_halves(change)
        if self.width is not None:
            change = torch.nn.functional.pad(change, (0, self.width - change.shape[1]))
        return self.scale * change

    def change(self, weight: Tensor) -> Tensor:
        """`dense()` in the weight's shape."""
        return self.dense().reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class FullTensor:
    """A whole parameter stored beside (or instead of) low-rank factors.

    mode "diff" adds value to the parameter, "set" replaces the parameter by value.
    """

    value: Tensor = field(repr=False)
    mode: str = "diff"

    def change(self, weight: Tensor) -> Tensor:
        """The float32 change of this parameter at strength 1, in the parameter's shape."""
        value = self.value.to(weight.device, torch.float32)
        return value - weight.float() if self.mode == "set" else value


def map_tensors(change: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A change with the function applied to each of its tensors, of any shape, always in the same order."""
    new = {}
    for item in fields(change):
        value = getattr(change, item.name)
        if isinstance(value, Tensor):
            new[item.name] = function(value)
        elif isinstance(value, Mapping):
            new[item.name] = {k: function(t) for k, t in value.items()}
        elif is_dataclass(value):
            new[item.name] = map_tensors(value, function)
    return replace(change, **new)


def swap_halves(rows: Tensor) -> Tensor:
    """Rows [2n, ...], halves exchanged: BFL's final layer has shift, scale; diffusers' scale, shift."""
    return torch.cat(rows.chunk(2)[::-1])


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core [i, j, kh, kw], a [i, out], b [j, in] -> [out, in, kh, kw] (LyCORIS `rebuild_tucker`)."""
    return torch.einsum("i j ..., j r, i p -> p r ...", core, b, a)
