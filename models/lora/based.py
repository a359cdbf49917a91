"""Changes that are functions of the weight they change: DoRA, GLoRA, and the rotations of `rotations.py`.

Each answers `change(weight)`, the float32 change at strength 1; a strength s adds s times it, so 0 is off.
shape is (outputs, inputs) with None where the file does not say. A file's fused layer (qkv, linear1) is cut
with `cut` where its rows are independent; where they are not, each part is a `Share` of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .kinds import Factored, LowRank, map_tensors, swap_halves

NO_SCALE = "none needed"


class Based:
    """What all of them share: no scale of their own, and how they are cut."""

    scale = 1.0
    scale_from = NO_SCALE
    rank: int
    shape: tuple[int | None, int | None]

    @property
    def columns(self) -> int | None:
        """Entries of one output's row, None where the file does not say."""
        return self.shape[1]

    def change(self, weight: Tensor) -> Tensor:
        """The float32 change of a weight [out, in] or [out, in, kh, kw], in its shape.

        To be written by each kind (NotImplementedError).
        """
        raise NotImplementedError

    def cut(self, start: int, stop: int) -> Based | None:
        """The change of these rows alone; None where it depends on the other rows."""
        return None


@dataclass(frozen=True, eq=False)
class Around(Based):
    """A change made out of another one, whose scale, rank and shape it has."""

    inner: Based | LowRank | Factored

    @property
    def scale(self) -> float:
        """Of the inner change."""
        return self.inner.scale

    @property
    def scale_from(self) -> str:
        """Which fact gave the scale (see `scale.py`)."""
        return self.inner.scale_from

    @property
    def rank(self) -> int:
        """Of the inner change."""
        return self.inner.rank

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(outputs, inputs) of the inner change, None where the file does not say."""
        return self.inner.shape

    @property
    def columns(self) -> int | None:
        """Entries of one output's row."""
        return self.inner.columns


@dataclass(frozen=True, eq=False)
class Dora(Around):
    """DoRA: `m * (W + dW) / norm(W + dW)`, the norm of each output's row, or of each input's column.

    magnitude: [out] or [in]. Source: arXiv 2402.09353, eq. 5; peft takes rows, LyCORIS either. (Core
    ComfyUI divides rows by the norm of W instead of W + dW.)
    """

    inner: LowRank | Factored
    magnitude: Tensor = field(repr=False)
    by_output: bool = True

    def change(self, weight: Tensor) -> Tensor:
        """The float32 change of a weight [out, in(, kh, kw)], in its shape; no norm is 0."""
        weight = weight.float()
        merged = weight + map_tensors(self.inner, lambda t: t.to(weight.device)).change(weight)
        axes = [i for i in range(weight.ndim) if i != (0 if self.by_output else 1)]
        norm = torch.linalg.vector_norm(merged, dim=axes, keepdim=True)
        magnitude = self.magnitude.to(weight.device).float().reshape(norm.shape)
        tiny = torch.finfo(torch.float32).tiny
        return merged * (magnitude / norm.clamp_min(tiny)) - weight

    def cut(self, start: int, stop: int) -> Dora | None:
        """These rows with their magnitudes; None if the norm is that of columns, which all rows enter."""
        if not self.by_output:
            return None
        inner = self.inner
        if isinstance(inner, LowRank):
            inner = replace(inner, B=inner.B[start:stop])
        else:
            inner = replace(inner, rows=(start, stop))
        return Dora(inner, self.magnitude[start:stop])


@dataclass(frozen=True, eq=False)
class Glora(Based):
    """GLoRA: `scale * (W A_left A_right + B_left B_right)`.

    A_left [in, rank], A_right [rank, in], B_left [out, rank], B_right [rank, in(, kh, kw)].
    Source: LyCORIS `glora.py`, arXiv 2306.07967.
    """

    A_left: Tensor = field(repr=False)
    A_right: Tensor = field(repr=False)
    B_left: Tensor = field(repr=False)
    B_right: Tensor = field(repr=False)
    scale: float = 1.0
    scale_from: str = "given"

    @property
    def rank(self) -> int:
        """Columns of the left factors, rows of the right ones."""
        return self.A_right.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.B_left.shape[0], self.A_left.shape[0]

    @property
    def columns(self) -> int:
        """Entries of one output's row: inputs times kernel."""
        return self.B_right.shape[1:].numel()

    def change(self, weight: Tensor) -> Tensor:
        """The float32 change of a weight [out, in(, kh, kw)], in its shape; the kernel is carried along."""
        weight = weight.float()
        left, right, up, down = (
            t.to(weight.device).float().flatten(1)
            for t in (self.A_left, self.A_right, self.B_left, self.B_right)
        )
        along = torch.einsum("o i ..., i r, r j -> o j ...", weight, left, right)
        return self.scale * (along + (up @ down).reshape(weight.shape))

    def cut(self, start: int, stop: int) -> Glora:
        """These rows: only B_left tells outputs apart."""
        return replace(self, B_left=self.B_left[start:stop])


@dataclass(frozen=True, eq=False)
class Swapped(Around):
    """A change written for a layer whose two row halves stand the other way round."""

    def change(self, weight: Tensor) -> Tensor:
        """The float32 change of a weight [out, in] whose halves stand as in diffusers."""
        return swap_halves(self.inner.change(swap_halves(weight)))


@dataclass(frozen=True, eq=False)
class Share(Around):
    """One layer's rows of a change, `inner`, that only the fused layer as a whole defines.

    members: the diffusers layers whose weights, one under the other, are the fused weight; index: which of
    them this is; sizes: their rows.
    """

    members: tuple[str, ...]
    index: int
    sizes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int | None]:
        """(outputs of this layer, inputs or None)."""
        return self.sizes[self.index], self.inner.shape[1]

    def change_among(self, weights: list[Tensor]) -> Tensor:
        """The float32 change [out, in] of this member, given the weights of all members in order."""
        device = weights[self.index].device
        fused = torch.cat([w.to(device, torch.float32) for w in weights])
        return self.inner.change(fused).split(list(self.sizes))[self.index]
