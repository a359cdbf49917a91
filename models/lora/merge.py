"""A LoRA merged into a module's weights for good, as training does with what it builds upon."""

from __future__ import annotations

import torch
from torch import nn

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
    check_mergeable(weights, strength)
    fitting, full, notes, skipped = fit_all(module, weights)
    if lost := [key for key, _ in skipped if key in weights.modules or key in weights.full]:
        raise LoraError(f"{weights.name} cannot be merged: the model has no {lost[0]} ({len(lost)} such)")
    changes = [*((f"{p}.weight", change) for p, change in fitting.items()), *full.items()]
    parameters = dict(module.named_parameters())
    for name, _ in changes:
        dtype = parameters[name].dtype if name in parameters else None
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            raise LoraError(
                f"{weights.name} cannot be merged into {name}, stored as {dtype}: merge into weights of "
                "bfloat16 or finer, and quantise afterwards"
            )
    if weights.info.sigma_window is not None:
        notes.append("its sigma window is not kept: merged weights act at every noise level")
    shared = [change for change in fitting.values() if isinstance(change, Share)]
    before = {
        f"{m}.weight": parameters[f"{m}.weight"].float().clone() for change in shared for m in change.members
    }
    for name, change in changes:
        parameter = parameters[name]
        if isinstance(change, Share):
            added = change.change_among([before[f"{member}.weight"] for member in change.members])
        else:
            added = change.change(parameter)
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


def check_mergeable(weights: LoraWeights, strength: float = 1.0) -> None:
    """Raises LoraError for what can be merged into no model: experts, and a whole model."""
    check_applicable(weights, strength)
    experts = next((p for p, change in weights.modules.items() if isinstance(change, MoeLowRank)), None)
    if experts is not None:
        raise LoraError(
            f"{weights.name} cannot be merged: {experts} has experts, chosen by token: give a plain LoRA"
        )
