"""The one form every LoRA file is read into: modules keyed by diffusers module path, each with its scale.

Not for reading files (`read.py`) and not for putting weights onto a model (`diffusers.py`, `comfy.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


class LoraError(ValueError):
    """A LoRA that cannot be read or does not fit the model; the message is one sentence with the way out."""


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
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Tensor:
        """The weight change in float32: [out, in] or [out, in, kh, kw]."""
        change = self.B.float().flatten(1) @ self.A.float().flatten(1)
        return self.scale * change.reshape(self.B.shape[0], *self.A.shape[1:])


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
        return self.A.shape[1]

    @property
    def experts(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[1], self.A.shape[2]


@dataclass(frozen=True, eq=False)
class Factored:
    """LyCORIS weight changes: LoKr `kron(w1, w2)` or LoHa `(w1_b w1_a) * (w2_b w2_a)`, times scale.

    rows selects the part of the product that belongs to this module when the file's layer is a fused one
    (qkv, linear1); None means all of it.
    """

    kind: str
    factors: Mapping[str, Tensor] = field(repr=False)
    scale: float = 1.0
    scale_from: str = "given"
    rows: tuple[int, int] | None = None

    @property
    def rank(self) -> int:
        key = "w1" if self.kind == "lokr" else "w1_b"
        return min(self.factors[key].shape)

    @property
    def shape(self) -> tuple[int, int]:
        f = self.factors
        if self.kind == "lokr":
            out, width = f["w1"].shape[0] * f["w2"].shape[0], f["w1"].shape[1] * f["w2"].shape[1]
        else:
            out, width = f["w1_a"].shape[0], f["w1_b"].shape[1]
        return (out if self.rows is None else self.rows[1] - self.rows[0]), width

    def dense(self) -> Tensor:
        f = {name: t.float() for name, t in self.factors.items()}
        if self.kind == "lokr":
            w1 = f["w1"].reshape(*f["w1"].shape, *(1,) * (f["w2"].ndim - 2))
            change = torch.kron(w1.contiguous(), f["w2"].contiguous())
        else:
            change = (f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])
        if self.rows is not None:
            change = change[self.rows[0] : self.rows[1]]
        return self.scale * change


@dataclass(frozen=True, eq=False)
class FullTensor:
    """A whole parameter stored beside (or instead of) low-rank factors.

    mode "diff" adds value to the parameter, "set" replaces the parameter by value.
    """

    value: Tensor = field(repr=False)
    mode: str = "diff"


Module = LowRank | MoeLowRank | Factored


@dataclass(frozen=True)
class LoraInfo:
    """What a file says about itself; None where it says nothing. sigma_window is (start, end], 1 = noise.

    curve: (step, reward) of a reward-trained file, in order; empty for others.
    """

    format: str = "unknown"
    base: str = "unknown"
    rank: int | None = None
    alpha: float | None = None
    alpha_from: str = ""
    algorithm: str | None = None
    reward: str | None = None
    step: int | None = None
    sigma_window: tuple[float, float] | None = None
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """A LoRA in canonical form.

    modules: diffusers module path (`transformer_blocks.0.attn.to_q`) -> its low-rank change.
    full: diffusers parameter path (`transformer_blocks.0.attn.norm_q.weight`) -> whole tensor.
    skipped: (key in the file, why) for everything that was not taken; notes: sentences worth reading.
    """

    modules: Mapping[str, Module] = field(default_factory=dict)
    full: Mapping[str, FullTensor] = field(default_factory=dict)
    info: LoraInfo = field(default_factory=LoraInfo)
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    name: str = "lora"

    @property
    def is_moe(self) -> bool:
        return any(isinstance(m, MoeLowRank) for m in self.modules.values())

    @property
    def is_checkpoint(self) -> bool:
        """True when the file is a whole fine-tuned model rather than a LoRA."""
        return not self.modules and len(self.full) > 0 and self.info.format == "full checkpoint"


@dataclass(frozen=True)
class Report:
    """What happened to every part of a LoRA when it was put onto a model; `str(report)` is for people."""

    name: str
    info: LoraInfo
    loaded: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    window: tuple[float, float] | None = None
    strength: float = 1.0

    def __str__(self) -> str:
        i = self.info
        lines = [
            f"{self.name}: {i.format}, base {i.base}, rank {_or(i.rank)}, "
            f"alpha {_or(i.alpha)} ({i.alpha_from})",
            f"loaded {len(self.loaded)} modules at strength {self.strength:g}"
            + (f", {len(self.runtime)} of them at run time" if self.runtime else ""),
        ]
        trained = [f"{k} {v}" for k in ("algorithm", "reward", "step") if (v := getattr(i, k)) is not None]
        if trained:
            lines.append("trained with " + ", ".join(trained))
        if self.window is not None:
            lines.append(f"active for {self.window[0]:g} >= sigma > {self.window[1]:g}")
        lines.extend(self.notes)
        if not self.skipped:
            lines.append("skipped nothing")
        by_reason: dict[str, list[str]] = {}
        for key, why in self.skipped:
            by_reason.setdefault(why, []).append(key)
        for why, keys in by_reason.items():
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            lines.append(f"skipped {len(keys)}: {', '.join(keys[:3])}{more}: {why}")
        return "\n".join(lines)


def _or(value: object) -> object:
    return "unknown" if value is None else value
