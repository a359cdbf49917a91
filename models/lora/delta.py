"""Changes computed while the model runs: `y += strength * change(x)`.

For what cannot be merged into a weight (experts routed per token, changes active only for some sigmas,
quantised weights).
Host-neutral: `diffusers.py` and `comfy.py` decide which layers get one, and when.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import moe
from .based import Share
from .errors import LoraError
from .kinds import map_tensors
from .weights import Based, Factored, FullTensor, LowRank, Module, MoeLowRank


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
        """What is added to the output: [..., out] of this layer's part, in x's dtype, for x [..., in].

        To be written by each kind (NotImplementedError).
        """
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """The output y [..., out] or [B, out, h, w] with the change added; x is the layer's input."""
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
        """[..., out], or [B, out, h, w] with the convolution's own stride and padding."""
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
        """[..., out]: the gated sum of the experts of each token of x [..., in]."""
        return self._mix(x, None)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """As in `Delta`; without `rows` the sum is added in the same pass."""
        return self._mix(x, y) if self.rows is None else super().forward(x, y, layer)

    def _mix(self, x: Tensor, base: Tensor | None) -> Tensor:
        down, up = self.down.to(x), self.up.to(x)
        scale = self.scale * self.strength
        return moe.moe_delta(
            x, down, up, self.experts, scale=scale, top_k=self.top_k, gate=self.gate, base=base
        )


class WeightDelta(Delta):
    """A change computed as a float32 weight at each call: LyCORIS factors, whole weights, `based.py`.

    members: the layers that a `Share` needs besides its own.
    """

    def __init__(
        self,
        module: Factored | Based | FullTensor,
        rows: tuple[int, int] | None = None,
        members: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__(rows)
        self.module = module
        self._members = tuple(members)  # a tuple: they are not ours to move
        self.tensors = nn.ParameterList()
        map_tensors(module, self._keep)

    def _keep(self, tensor: Tensor) -> Tensor:
        self.tensors.append(_weight(tensor))
        return tensor

    def _current(self) -> Factored | Based | FullTensor:
        """The module with the tensors where the host has moved them to."""
        tensors = iter(self.tensors)
        return map_tensors(self.module, lambda _: next(tensors))

    def change(self, x: Tensor, layer: nn.Module) -> Tensor:
        """[..., out] or [B, out, h, w]: x through the layer's operation with the change as its weight."""
        module = map_tensors(self._current(), lambda t: t.to(x.device))
        if isinstance(module, Factored):
            weight = self._factored(module, x)
            if weight is None:
                return _kron(module, x) * self.strength
        elif isinstance(module, Share):
            weight = module.change_among([layer_weight(m, x) for m in self._members])
        else:
            weight = layer_weight(layer, x)
            weight = module.change(weight if self.rows is None else weight.narrow(0, *self.rows))
        weight = (self.strength * weight).to(x)
        if isinstance(layer, nn.Conv2d):
            weight = weight.reshape(weight.shape[0], -1, *layer.kernel_size)
            return F.conv2d(x, weight, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
        return F.linear(x, weight.flatten(1))

    @staticmethod
    def _factored(module: Factored, x: Tensor) -> Tensor | None:
        plain = module.rows is None and not module.swap and module.width is None
        if (
            module.kind == "lokr"
            and plain
            and len(module.whole_shape) == 2
            and x.shape[-1] == module.shape[1]
        ):
            return None  # without building the product
        return module.dense()


class BiasDelta(Delta):
    """A whole bias: added, or put in the place of the layer's own."""

    def __init__(self, tensor: FullTensor, rows: tuple[int, int] | None = None) -> None:
        super().__init__(rows)
        self.value, self.replaces = _weight(tensor.value), tensor.mode == "set"

    def change(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The bias [out] to be added; where it replaces the layer's own, the difference to that."""
        value = self.value.to(x.device, torch.float32)
        if self.replaces and layer.bias is not None:
            bias = layer.bias.to(x.device, torch.float32)
            value = value - (bias if self.rows is None else bias.narrow(0, *self.rows))
        return (self.strength * value).to(x.dtype)


def _kron(module: Factored, x: Tensor) -> Tensor:
    w1, w2 = (w.to(x) for w in module.kron_factors())
    blocks = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
    return torch.einsum("ab,cd,...bd->...ac", w1, w2, blocks).flatten(-2) * module.scale


def layer_weight(layer: nn.Module, like: Tensor) -> Tensor:
    """A layer's weight [out, in(, kh, kw)] in float32 on like's device, however it is stored.

    Where it is quantised, offloaded or patched on the way, it is what the layer answers to the identity.
    Raises LoraError for a quantised layer that cannot be asked.
    """
    weight = getattr(layer, "weight", None)
    if _is_plain(layer, weight):
        return weight.detach().to(like.device, torch.float32)
    if not hasattr(layer, "in_features"):
        raise LoraError(f"the weight of a {type(layer).__name__} is quantised: load the model unquantised")
    probe = torch.zeros(layer.in_features + 1, layer.in_features, device=like.device, dtype=like.dtype)
    probe[1:].fill_diagonal_(1)
    answer = layer.forward(probe).float()
    return (answer[1:] - answer[:1]).T


def _is_plain(layer: nn.Module, weight: object) -> bool:
    """Whether the stored weight is the one that the layer multiplies with."""
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
        return False
    if getattr(layer, "weight_function", None) or getattr(layer, "scale_weight", None) is not None:
        return False  # ComfyUI: patches still to be applied, or scaled fp8
    return weight.is_floating_point() and weight.ndim > 1


def delta_for(
    module: Module, rows: tuple[int, int] | None = None, members: Sequence[nn.Module] = ()
) -> Delta:
    """The run-time form of a canonical module."""
    if isinstance(module, LowRank):
        return PlainDelta(module, rows)
    if isinstance(module, MoeLowRank):
        return MoeDelta(module, rows)
    return WeightDelta(module, rows, members)


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
