"""Parameters of a module rewritten by LoRAs: each can be switched and taken off, in any order.

The untouched original is kept and the parameter recomputed from it, so the last one off leaves every bit as
it was. For what no low-rank adapter can hold: whole tensors, and changes that are functions of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Writer:
    """One LoRA's change of one parameter: float32, at strength 1, given the parameter as it is before it."""

    change: Callable[[Tensor], Tensor]
    strength: float = 0.0


@dataclass(eq=False)
class Overwritten:
    """A parameter, what it was, and who changes it, in order."""

    parameter: Tensor
    original: Tensor
    writers: list[Writer] = field(default_factory=list)

    @torch.no_grad()
    def recompute(self) -> None:
        """Write original plus all changes, in float32 and in order, into the parameter."""
        value = self.original
        for writer in self.writers:
            if writer.strength:
                value = value.float() + writer.strength * writer.change(value).to(value.device)
        self.parameter.copy_(value)


_OF: WeakKeyDictionary[nn.Module, dict[str, Overwritten]] = WeakKeyDictionary()


def add(module: nn.Module, name: str, parameter: Tensor, change: Callable[[Tensor], Tensor]) -> Writer:
    """Registers a change of a parameter, switched off; name is the parameter's path in the module."""
    entries = _OF.setdefault(module, {})
    if name not in entries:
        entries[name] = Overwritten(parameter, parameter.detach().clone())
    writer = Writer(change)
    entries[name].writers.append(writer)
    return writer


def original(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """What the parameter was before any of these changes, in its shape and dtype."""
    entry = _OF.get(module, {}).get(name)
    return parameter.detach() if entry is None else entry.original


def set_strength(module: nn.Module, name: str, writer: Writer, strength: float) -> None:
    """Rewrites the parameter with this writer at a strength."""
    if writer.strength != strength:
        writer.strength = strength
        _OF[module][name].recompute()


def remove(module: nn.Module, name: str, writer: Writer) -> None:
    """Takes a change off; with the last one the original comes back bit for bit."""
    entry = _OF.get(module, {}).get(name)
    if entry is None or writer not in entry.writers:
        return
    entry.writers.remove(writer)
    entry.recompute()
    if not entry.writers:
        del _OF[module][name]
