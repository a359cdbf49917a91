"""Low-rank changes computed while the model runs: `y += strength * change(x)`.

For what cannot be merged into a weight (experts routed per token, changes active only for some sigmas).
Host-neutral: `diffusers.py` and `comfy.py` decide which layers get one, and when.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import moe
from .weights import Factored, LowRank, Module, MoeLowRank


class Delta(nn.Module):
    """One layer's change. Called with the layer's input and output, returns the changed output.

    rows: output columns it is added to when the live layer is a fused one (start, length), else None.
    Its tensors are parameters, so that hosts which move modules between devices count and move them; a call
    casts them to the input's device and dtype where they differ.
    """

    def __init__(self, rows: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.rows = rows
        self.strength = 1.0

    def change(self, x: Tensor, layer: nn.Module) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        change = self.change(x, layer)
        if self.rows is None:
            return y + change
        # The layer's own fresh output: in place saves a copy of a fused layer's wide result.
        y = y.clone() if y.requires_grad else y
        y.narrow(-1, *self.rows).add_(change)
        return y


class PlainDelta(Delta):
    """`scale * B A x` for Linear, or the two convolutions for Conv2d."""

    def __init__(self, module: LowRank, rows: tuple[int, int] | None = None) -> None:
        super().__init__(rows)
        self.A, self.B, self.scale = _weight(module.A), _weight(module.B), module.scale

    def change(self, x: Tensor, layer: nn.Module) -> Tensor:
        A, B = self.A.to(x), self.B.to(x)
        if isinstance(layer, nn.Conv2d):
            A = A.reshape(A.shape[0], -1, *layer.kernel_size)
            hidden = F.conv2d(x, A, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
            return F.conv2d(hidden * (self.scale * self.strength), B.reshape(*B.shape[:2], 1, 1))
        return F.linear(F.linear(x, A.flatten(1)) * (self.scale * self.strength), B.flatten(1))


class MoeDelta(Delta):
    """Token-wise routed experts; see `moe.py`."""

    def __init__(self, module: MoeLowRank, rows: tuple[int, int] | None = None) -> None:
        super().__init__(rows)
        down, up = moe.stack(module.A, module.B, module.router)
        self.down, self.up = _weight(down), _weight(up)
        self.scale, self.experts = module.scale, module.experts
        self.top_k, self.gate = module.top_k, module.gate

    def change(self, x: Tensor, layer: nn.Module) -> Tensor:
        return self._mix(x, None)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        return self._mix(x, y) if self.rows is None else super().forward(x, y, layer)

    def _mix(self, x: Tensor, base: Tensor | None) -> Tensor:
        down, up = self.down.to(x), self.up.to(x)
        scale = self.scale * self.strength
        return moe.moe_delta(
            x, down, up, self.experts, scale=scale, top_k=self.top_k, gate=self.gate, base=base
        )


class FactoredDelta(Delta):
    """LoKr without building its product; LoHa (and a part of a fused LoKr) with it, one layer at a time."""

    def __init__(self, module: Factored, rows: tuple[int, int] | None = None) -> None:
        super().__init__(rows)
        self.module = module
        self.factors = nn.ParameterDict({k: _weight(t) for k, t in module.factors.items()})

    def change(self, x: Tensor, layer: nn.Module) -> Tensor:
        f = {k: t.to(x) for k, t in self.factors.items()}
        m = self.module
        if m.kind == "lokr" and m.rows is None and f["w2"].ndim == 2:
            w1, w2 = f["w1"], f["w2"]
            blocks = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
            mixed = torch.einsum("ab,cd,...bd->...ac", w1, w2, blocks).flatten(-2)
            return mixed * (m.scale * self.strength)
        weight = Factored(m.kind, f, m.scale * self.strength, rows=m.rows).dense().to(x)
        if isinstance(layer, nn.Conv2d):
            weight = weight.reshape(weight.shape[0], -1, *layer.kernel_size)
            return F.conv2d(x, weight, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
        return F.linear(x, weight.flatten(1))


def delta_for(module: Module, rows: tuple[int, int] | None = None) -> Delta:
    """The run-time form of a canonical module."""
    kinds = {LowRank: PlainDelta, MoeLowRank: MoeDelta, Factored: FactoredDelta}
    return kinds[type(module)](module, rows)


def in_window(sigma: float, window: tuple[float, float] | None) -> bool:
    """True while start >= sigma > end (1 = noise); no window is always.

    Compared in float32, which schedules are in: 0.4 of a schedule and 0.4 of a widget are the same.
    """
    if window is None:
        return True
    start, end, sigma = np.float32(window[0]), np.float32(window[1]), np.float32(sigma)
    return bool(start >= sigma > end)


def check_window(window: tuple[float, float] | None) -> tuple[float, float] | None:
    """A window that is everything becomes None. Raises ValueError unless 1 >= start > end >= 0."""
    if window is None:
        return None
    start, end = float(window[0]), float(window[1])
    if not 1.0 >= start > end >= 0.0:
        raise ValueError(
            f"sigma window is start {start:g}, end {end:g}, but sigma runs from 1 (noise) down to 0: "
            "choose 1 >= start > end >= 0"
        )
    return None if (start, end) == (1.0, 0.0) else (start, end)


def _weight(tensor: Tensor) -> nn.Parameter:
    if tensor.dtype.itemsize < 2:
        tensor = tensor.to(torch.bfloat16)
    return nn.Parameter(tensor, requires_grad=False)
