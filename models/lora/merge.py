"""A LoRA merged into a module's weights for good, as training does with what it builds upon."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .based import Share
from .diffusers import fit_all
from .errors import LoraError
from .fit import check_applicable
from .weights import LoraWeights, MoeLowRank, Report


@torch.no_grad()
def merge(module: nn.Module, weights: LoraWeights, strength: float = 1.0) -> Report:
    """Adds strength times each change to the weights, in float32, rounded once to the weight's own type.

    Raises LoraError, before anything is changed, where a part has no place in this module or depends on the
    token (experts), or where the weights are too coarse to take it (float8, quantised).
    """
    check_applicable(weights, strength)
    fitting, full, notes, skipped = fit_all(module, weights)
    if lost := [key for key, _ in skipped if key in weights.modules or key in weights.full]:
        raise LoraError(f"{weights.name} cannot be merged: the model has no {lost[0]} ({len(lost)} such)")
    experts = next((p for p, change in fitting.items() if isinstance(change, MoeLowRank)), None)
    if experts is not None:
        raise LoraError(
            f"{weights.name} cannot be merged: {experts} has experts, chosen by token: give a plain LoRA"
        )
    changes = {f"{p}.weight": change for p, change in fitting.items()} | full
    parameters = dict(module.named_parameters())
    for name in changes:
        dtype = parameters[name].dtype if name in parameters else None
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            raise LoraError(
                f"{weights.name} cannot be merged into {name}, stored as {dtype}: merge into weights of "
                "bfloat16 or finer, and quantise afterwards"
            )
    shared = [change for change in fitting.values() if isinstance(change, Share)]
    before = {
        f"{m}.weight": parameters[f"{m}.weight"].float().clone() for change in shared for m in change.members
    }
    for name, change in changes.items():
        parameter = parameters[name]
        added = _change(change, name, parameter, before)
        parameter.copy_(parameter.float() + strength * added.to(parameter.device))
    return Report(
        weights.name,
        weights.info,
        tuple([*fitting, *full]),
        (),
        tuple(skipped),
        tuple(dict.fromkeys(notes)),
        None,
        strength,
    )


def _change(change, name: str, parameter: Tensor, before: dict[str, Tensor]) -> Tensor:
    """The float32 change; a whole bias beside a changed weight sees its own parameter only."""
    if isinstance(change, Share):
        return change.change_among([before[f"{member}.weight"] for member in change.members])
    return change.change(before.get(name, parameter))
