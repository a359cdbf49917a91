"""OFT and BOFT: a weight times an orthogonal matrix of small blocks (arXiv 2306.07280, 2311.06243).

LyCORIS and kohya turn the outputs, peft (and OneTrainer) the inputs; their parametrisations differ too, so
each is a class. A skew-symmetric Q gives the rotation (I + Q)(I - Q)^-1 (Cayley).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .based import Based


def cayley(Q: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 of skew-symmetric blocks [..., b, b], orthogonal."""
    identity = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype)
    return torch.linalg.solve(identity - Q, identity + Q, left=False)


def skew_limit(blocks: Tensor, constraint: float) -> float:
    """What Q = blocks - blocks^T, [..., b, b], is multiplied by to have a norm of at most constraint (0:
    any).
    """
    if constraint <= 0:
        return 1.0
    norm = float((blocks.float() - blocks.float().mT).norm())
    return 1.0 if norm <= constraint else constraint / norm


@dataclass(frozen=True, eq=False)
class OutputBlocks(Based):
    """Square blocks [..., k, b, b] that turn k b outputs.

    limit: see `skew_limit`; rescale: a factor for each output, or None.
    """

    blocks: Tensor = field(repr=False)
    limit: float = 1.0
    rescale: Tensor | None = field(default=None, repr=False)

    @property
    def rank(self) -> int:
        """The side b of a block."""
        return self.blocks.shape[-1]

    @property
    def shape(self) -> tuple[int, None]:
        """(outputs, None): a rotation of outputs takes any inputs."""
        return self.blocks.shape[-3] * self.blocks.shape[-2], None


@dataclass(frozen=True, eq=False)
class Oft(OutputBlocks):
    """Output blocks turned: rows of block k become `R_k^T W_k` (LyCORIS diag-oft, kohya oft).

    blocks: [k, b, b].
    """

    def change(self, weight: Tensor) -> Tensor:
        """The float32 change of a weight [out, in] or [out, in, kh, kw], in its shape."""
        weight = weight.float()
        Q = self.blocks.to(weight.device).float()
        R = cayley((Q - Q.mT) * self.limit)
        turned = torch.einsum("k n m, k n x -> k m x", R, weight.reshape(*Q.shape[:2], -1))
        return _rescaled(turned.reshape(weight.shape), self.rescale) - weight

    def cut(self, start: int, stop: int) -> Oft | None:
        """The blocks of these rows; None where a block mixes rows of two layers."""
        size = self.rank
        if start % size or stop % size:
            return None  # a block mixes rows of two layers
        rescale = None if self.rescale is None else self.rescale[start:stop]
        return replace(self, blocks=self.blocks[start // size : stop // size], rescale=rescale)


@dataclass(frozen=True, eq=False)
class Boft(OutputBlocks):
    """Outputs turned by m butterfly factors in turn (LyCORIS boft).

    blocks: [m, k, b, b]; factor i pairs outputs 2^i b/2 apart.
    """

    def change(self, weight: Tensor) -> Tensor:
        """The float32 change of a weight [out, in] or [out, in, kh, kw], in its shape."""
        weight = weight.float()
        Q = self.blocks.to(weight.device).float()
        R = cayley((Q - Q.mT) * self.limit)
        turned = weight.flatten(1)
        for i, factor in enumerate(R):
            half = 2**i * self.rank // 2
            pairs = turned.unflatten(0, (-1, 2, half)).transpose(1, 2)
            blocks = pairs.flatten(0, 2).unflatten(0, (-1, self.rank))
            mixed = (factor @ blocks).flatten(0, 1)
            turned = mixed.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
        return _rescaled(turned.reshape(weight.shape), self.rescale) - weight


@dataclass(frozen=True, eq=False)
class InputOft(Based):
    """Input blocks turned: `W R^T`, R block-diagonal (peft OFT, OneTrainer OFTv2).

    upper: [k, b (b - 1) / 2] the upper triangles of Q; k = 1 with more inputs: one block shared by all.
    terms: of the Neumann series that peft takes for the inverse by default (5); None: the exact inverse.
    size: b; inputs: None when the block is shared.
    """

    upper: Tensor = field(repr=False)
    size: int
    terms: int | None = 5
    shared: bool = False

    @property
    def rank(self) -> int:
        """The side b of a block."""
        return self.size

    @property
    def shape(self) -> tuple[None, int | None]:
        """(None, inputs), or (None, None) for a block shared by all inputs."""
        return None, None if self.shared else self.upper.shape[0] * self.size

    def rotation(self, device: torch.device) -> Tensor:
        """R's blocks [k, b, b] in float32."""
        upper = self.upper.to(device).float()
        Q = upper.new_zeros(len(upper), self.size, self.size)
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=device)
        Q[:, rows, columns] = upper
        Q = Q - Q.mT
        if self.terms is None:
            return cayley(-Q)  # peft: (I - Q)(I + Q)^-1
        # peft's `_cayley_batch`: I + 2 Q + 2 Q^2 + ... + Q^last; its 3 terms are its 4, and 2 are I + 2 Q
        last = max(self.terms, 4) - 1 if self.terms > 2 else None
        R, power = torch.eye(self.size, device=device).repeat(len(Q), 1, 1), Q
        for i in range(1, self.terms if last is None else last + 1):
            R = R + (power if i == last else 2 * power)
            power = power @ Q
        return R

    def change(self, weight: Tensor) -> Tensor:
        """The float32 change of a weight [out, in] or [out, in, kh, kw], in its shape."""
        weight = weight.float()
        R = self.rotation(weight.device)
        blocks = weight.reshape(weight.shape[0], -1, self.size)
        R = R.expand(blocks.shape[1], -1, -1)
        return torch.einsum("o k n, k m n -> o k m", blocks, R).reshape(weight.shape) - weight

    def cut(self, start: int, stop: int) -> InputOft:
        """Itself: every row is turned alike."""
        return self


@dataclass(frozen=True, eq=False)
class InputBoft(Based):
    """Inputs turned by m butterfly factors: `s * W R^T` (peft BOFT).

    blocks: [m, k, b, b], Q is half of blocks - blocks^T; rescale: s, a factor for each output.
    """

    blocks: Tensor = field(repr=False)
    rescale: Tensor = field(repr=False)

    @property
    def rank(self) -> int:
        """The side b of a block."""
        return self.blocks.shape[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.rescale.numel(), self.blocks.shape[1] * self.blocks.shape[2]

    def change(self, weight: Tensor) -> Tensor:
        """The float32 change of a weight [out, in] or [out, in, kh, kw], in its shape."""
        weight = weight.float()
        Q = self.blocks.to(weight.device).float()
        R = cayley((Q.mT - Q) / 2)
        turned = weight.flatten(1).T
        for i, factor in enumerate(R):
            order = self.order(i).to(weight.device)
            blocks = turned[order.argsort()].unflatten(0, (-1, self.rank))
            turned = (factor @ blocks).flatten(0, 1)[order]
        return _rescaled(turned.T.reshape(weight.shape), self.rescale) - weight

    def order(self, i: int) -> Tensor:
        """peft's `block_butterfly_perm` [inputs] of factor i: in runs of 2^i b, even half-blocks first."""
        inputs = torch.arange(self.blocks.shape[1] * self.rank)
        if i == 0:
            return inputs
        runs = inputs.reshape(-1, 2**i, 2, self.rank // 2)  # runs, blocks of a run, halves
        flat = runs.reshape(runs.shape[0], 2 ** (i + 1), -1)
        return torch.cat([flat[:, 0::2], flat[:, 1::2]], dim=1).flatten()

    def cut(self, start: int, stop: int) -> InputBoft:
        """The factors of these rows; the rotation is the same for all."""
        return replace(self, rescale=self.rescale.flatten()[start:stop])


def _rescaled(weight: Tensor, rescale: Tensor | None) -> Tensor:
    if rescale is None:
        return weight
    factor = rescale.to(weight.device).float().reshape(-1, *(1,) * (weight.ndim - 1))
    return weight * factor
