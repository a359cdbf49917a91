"""One layer's tensors as a file has them, and what the builders ask of it: take a tensor, its scale, fail."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import names
from .errors import LoraError
from .scale import ScaleRule


@dataclass
class Layer:
    """A layer's name in the file, the diffusers modules it stands for, and its tensors by role.

    constraint_per_output: trainers limit OFT's rotation by alpha times outputs, core ComfyUI by alpha.
    """

    file: str
    name: str
    where: tuple[names.Target, ...]
    parts: dict[str, Tensor]
    rule: ScaleRule
    top_k: int | None = None
    gate: str = "softmax_topk"
    peft: dict | None = None
    constraint_per_output: bool = True
    alpha: float | None = None
    stated: float | None = None

    def scale(self, rank: int | None) -> tuple[float, str]:
        """The scale of a change of this rank and where it came from; None: a LoKr with whole factors."""
        if self.stated is not None and self.rule.override is None:
            return self.stated, ".scale in the file"
        return self.rule.of((self.name, self.where[0].path), rank, self.alpha)

    def fail(self, what: str) -> LoraError:
        """The error that names the file and the layer, to be raised by the caller."""
        return LoraError(f"{self.file}: {self.name} {what}")

    def take(self, role: str, *dims: int) -> Tensor | None:
        """Remove a role's tensor and return it, None if there is none; dims: how many dimensions it may have.

        Raises LoraError for another number of dimensions, an axis of 0, and integers.
        """
        tensor = self.parts.pop(role, None)
        if tensor is None:
            return None
        if not tensor.is_floating_point():
            raise self.fail(f"stores {role} as {tensor.dtype}: it is quantised or damaged, get the original")
        if dims and (tensor.ndim not in dims or 0 in tensor.shape):
            raise self.fail(f"has {role} of shape {list(tensor.shape)}: the file is damaged")
        return tensor

    def number(self, role: str) -> float | None:
        """The value of a one-element tensor; None if there is none.

        Raises LoraError if it is not one finite number.
        """
        tensor = self.parts.pop(role, None)
        if tensor is None:
            return None
        if tensor.numel() != 1 or tensor.is_complex() or not tensor.double().isfinite():
            raise self.fail(
                f"has {role} {list(tensor.shape)}, which is not one finite number: the file is damaged"
            )
        return float(tensor.double())
