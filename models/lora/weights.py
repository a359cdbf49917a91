"""The one form every LoRA file is read into: modules keyed by diffusers module path, each with its scale.

Not for reading files (`read.py`) and not for putting weights onto a model (`diffusers.py`, `comfy.py`). The
kinds of change are in `kinds.py`, `based.py` and `rotations.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .based import Based
from .errors import LoraError, printable
from .kinds import Factored, FullTensor, LowRank, MoeLowRank

Module = LowRank | MoeLowRank | Factored | Based


@dataclass(frozen=True)
class LoraInfo:
    """What a file says about itself; None where it says nothing.

    stated_base: the model its header names, in the trainer's own words; base: the family, from its layers.
    sigma_window: noise levels start >= level > end, 1 = noise; a flow's sigma, or an epsilon model's timestep
    by its training timesteps.
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
    stated_base: str | None = None


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
        """Whether any layer has a mixture of experts, which no weight can hold."""
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
        lines.extend(self.left_out() or ["skipped nothing"])
        return "\n".join(printable(line) for line in lines)

    def left_out(self) -> list[str]:
        """A line for each reason that something was skipped."""
        by_reason: dict[str, list[str]] = {}
        for key, why in self.skipped:
            by_reason.setdefault(why, []).append(key)
        lines = []
        for why, keys in by_reason.items():
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            lines.append(f"skipped {len(keys)}: {', '.join(keys[:3])}{more}: {why}")
        return lines


def _or(value: object) -> object:
    return "unknown" if value is None else value


__all__ = [
    "Based",
    "Factored",
    "FullTensor",
    "LoraError",
    "LoraInfo",
    "LoraWeights",
    "LowRank",
    "MoeLowRank",
    "Module",
    "Report",
]
