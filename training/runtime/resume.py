"""What a checkpoint of a run holds and how a run goes on from it. Getting it to disk: `checkpoint.py`; which
options may change in between: `changes.py`.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import changes, checkpoint, disk
from .checkpoint import TrainingError
from .optim import MovingAverage
from .processes import Processes
from .random_streams import rng_state, set_rng_state

logger = logging.getLogger(__name__)

ROOM = 16 << 20  # bytes without which no run is worth beginning
MOMENTS = {"adamw": 2.0, "prodigy": 4.0, "adamw8bit": 0.5}  # float32 tensors an optimiser keeps per weight


@dataclass(frozen=True)
class RunState:
    """All that a run is made of at one step, as a checkpoint keeps it.

    parameters: the trained tensors by name. data: hash of the rows. options_content: `changes.stamps` of the
    recipe. tensors, values: what one kind of training keeps beside, {file name: tensors} and JSON values.
    """

    config: Any
    processes: Processes
    parameters: dict[str, Tensor]
    optimizer: Any
    average: MovingAverage | None
    step: int
    micro: int
    data: str
    options_content: dict[str, str]
    tensors: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


def write(state: RunState, root: Path) -> Path:
    """Write a checkpoint into the folder of checkpoints `root`; all processes call it. Returns its folder.

    Raises TrainingError where it cannot be written.
    """
    writer = checkpoint.Writer(root, state.step, state.config.keep_last)
    wait = state.processes.wait
    if not state.processes.main:
        wait()  # the folder is there
        _own_part(state, writer.folder)
        wait()  # all parts are there
        wait()  # it is in place
        return writer.final
    with writer:
        wait()
        _own_part(state, writer.folder)
        _common_parts(state, writer)
        wait()
    wait()
    return writer.final


def rescue(state: RunState, root: Path) -> str:
    """Keep the state of a run in one process that must end, in `root` or where else there is room.

    Returns half a sentence for the error that ends it: where the state is, and how to go on from it.
    """
    elsewhere = disk.places(Path(f"{root.parent.resolve().name}_{root.name}"))
    for place in (root, *elsewhere):
        try:
            with checkpoint.Writer(place, state.step, state.config.keep_last) as writer:
                _own_part(state, writer.folder)
                _common_parts(state, writer)
        except (TrainingError, OSError):
            if place != root:
                shutil.rmtree(place, ignore_errors=True)
            continue
        how = "auto" if place == root else writer.final
        return f"step {state.step} is kept in {writer.final}, go on from it with resume: {how}"
    return checkpoint.last_good(root)


def _own_part(state: RunState, folder: Path) -> None:
    """What every process writes: its generators, and its shards if the engine shards."""
    torch.save(rng_state(), folder / f"rng_{state.processes.rank:03d}.pt")
    if state.processes.sharded:
        state.processes.accelerator.save_state(str(folder / "engine"))


def _common_parts(state: RunState, writer: checkpoint.Writer) -> None:
    """What the main process writes for all."""
    if not state.processes.sharded:
        writer.tensors("trained.safetensors", state.parameters)
        torch.save(state.optimizer.state_dict(), writer.folder / "optimizer.pt")
        if state.average is not None:
            writer.tensors("ema.safetensors", state.average.values)
        for name, tensors in state.tensors.items():
            writer.tensors(name, tensors)
    writer.state(
        {
            **state.values,
            "step": state.step,
            "micro": state.micro,
            "ema_updates": state.average.updates if state.average is not None else 0,
            "data": state.data,
            "world": state.processes.world,
            "config": dataclasses.asdict(state.config),
            "files_of_config": state.options_content,
        }
    )


def check_room(state: RunState, root: Path) -> None:
    """Raise ValueError, before the first step, where the checkpoints to come in `root` and the result beside
    it have no room.
    """
    if state.processes.sharded or not state.processes.main:
        return
    c, weights = state.config, 4 * sum(tensor.numel() for tensor in state.parameters.values())
    more = len(state.tensors) + (state.average is not None)
    one = weights * (1 + MOMENTS[c.optimizer] + more)
    coming = -(-max(0, c.max_steps - state.step) // c.save_every)
    # The oldest goes when the newest is in place, so there is one more than are kept.
    new = min(coming, c.keep_last + 1 - min(c.keep_last, len(checkpoint.folders(root))))
    disk.check_room(root.parent, int(new * one + weights), f"output_dir {root.parent}")


def find(
    config: Any, processes: Processes, options_content: dict[str, str], root: Path
) -> checkpoint.Found | None:
    """The checkpoint that `config.resume` asks for, verified, of a recipe that can go on; loads no model.

    Raises ValueError in every process where it cannot.
    """
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [None, None]
    if processes.main:
        try:
            checkpoint.sweep(root)
            answer[0] = found = checkpoint.find(root, config.resume)
            if found is not None:
                values = checkpoint.read_state(found.folder)
                named = changes.check(values, config, processes.world, options_content, found.folder)
                for sentence in named:
                    logger.warning("%s", sentence)
        except ValueError as error:
            answer = [None, str(error)]
    if processes.world > 1:
        broadcast_object_list(answer)
    if answer[1]:
        raise ValueError(answer[1])
    return answer[0]


def read(found: checkpoint.Found, state: RunState) -> dict[str, Any]:
    """Put a checkpoint's weights, moments, average and generators into those of a run that is to go on.

    Returns the values of its state.json. Raises ValueError if it does not fit the model.
    """
    folder, processes = found.folder, state.processes
    values = checkpoint.read_state(folder)
    if processes.sharded:
        processes.accelerator.load_state(str(folder / "engine"))
    else:
        tensors = checkpoint.read_tensors(folder, "trained.safetensors")
        checkpoint.copy_into(state.parameters, tensors, str(folder))
        _read_optimizer(found, state.optimizer)
        if state.average is not None:
            _read_average(found, state, values["ema_updates"])
    rng = f"rng_{processes.rank:03d}.pt"
    if found.has(rng):
        set_rng_state(torch.load(folder / rng, weights_only=True))
    else:
        logger.warning("%s has no %s: the dropout of process %d begins anew", folder, rng, processes.rank)
    if values["data"] != state.data:
        logger.warning("the data changed since %s was written: the rows come in another order", folder)
    if processes.main:
        logger.info("resumed at step %d from %s", values["step"], folder)
    return values


def _read_optimizer(found: checkpoint.Found, optimizer: Any) -> None:
    if not found.has("optimizer.pt"):
        logger.warning("%s has no optimizer.pt: the optimiser's moments begin anew", found.folder)
        return
    moments = torch.load(found.folder / "optimizer.pt", map_location="cpu", weights_only=True)
    wanted = [{name: group[name] for name in ("betas", "weight_decay")} for group in optimizer.param_groups]
    optimizer.load_state_dict(moments)
    for group, values in zip(optimizer.param_groups, wanted, strict=True):
        group.update(values)  # the recipe's, where it was changed since; the moments stay


def _read_average(found: checkpoint.Found, state: RunState, updates: int) -> None:
    average, device = state.average, state.processes.device
    if found.has("ema.safetensors"):
        averages = checkpoint.read_tensors(found.folder, "ema.safetensors")
        average.values = {k: v.to(device) for k, v in averages.items()}
        average.updates = updates
        return
    logger.warning("%s has no ema.safetensors: the average begins at the present weights", found.folder)
    average.restart(state.parameters)
