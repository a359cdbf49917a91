"""What a checkpoint of a run holds and how a run goes on from it. Getting it to disk: `checkpoint.py`; which
options may change in between: `changes.py`.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from . import changes, checkpoint, disk

logger = logging.getLogger(__name__)

ROOM = 16 << 20  # bytes without which no run is worth beginning
MOMENTS = {"adamw": 2.0, "prodigy": 4.0, "adamw8bit": 0.5}  # float32 tensors an optimiser keeps per weight


def write(trainer: Any) -> Path:
    """Write a checkpoint of the trainer's present step; all processes call it. Returns its folder."""
    writer = checkpoint.Writer(trainer.checkpoints, trainer.step, trainer.config.keep_last)
    together = trainer.accelerator.wait_for_everyone
    if not trainer.main:
        together()  # the folder is there
        _own_part(trainer, writer.folder)
        together()  # all parts are there
        together()  # it is in place
        return writer.final
    with writer:
        together()
        _own_part(trainer, writer.folder)
        _common_parts(trainer, writer)
        together()
    together()
    return writer.final


def write_alone(trainer: Any, root: Path) -> Path:
    """As `write`, of a run in one process, into any folder of checkpoints."""
    with checkpoint.Writer(root, trainer.step, trainer.config.keep_last) as writer:
        _own_part(trainer, writer.folder)
        _common_parts(trainer, writer)
    return writer.final


def _common_parts(trainer: Any, writer: checkpoint.Writer) -> None:
    if not trainer.sharded:
        writer.tensors("trained.safetensors", trainer.names)
        torch.save(trainer.optimizer.state_dict(), writer.folder / "optimizer.pt")
        if trainer.average is not None:
            writer.tensors("ema.safetensors", trainer.average.values)
        for name, tensors in trainer.extra_tensors().items():
            writer.tensors(name, tensors)
    writer.state(
        {
            **trainer.extra_state(),
            "step": trainer.step,
            "micro": trainer.micro,
            "ema_updates": trainer.average.updates if trainer.average is not None else 0,
            "data": trainer.batches.fingerprint(),
            "world": trainer.world,
            "config": dataclasses.asdict(trainer.config),
            "files_of_config": trainer.stamps,
        }
    )


def check_room(trainer: Any) -> None:
    """Raise ValueError, before the first step, where the checkpoints to come and the result have no room."""
    if trainer.sharded or not trainer.main:
        return
    c, weights = trainer.config, 4 * sum(tensor.numel() for tensor in trainer.names.values())
    more = len(trainer.extra_tensors()) + (trainer.average is not None)
    one = weights * (1 + MOMENTS[c.optimizer] + more)
    coming = -(-max(0, c.max_steps - trainer.step) // c.save_every)
    # The oldest goes when the newest is in place, so there is one more than are kept.
    new = min(coming, c.keep_last + 1 - min(c.keep_last, len(checkpoint.folders(trainer.checkpoints))))
    disk.check_room(trainer.output, int(new * one + weights), f"output_dir {trainer.output}")


def _own_part(trainer: Any, folder: Path) -> None:
    """What every process writes: its generators, and its shards if the engine shards."""
    torch.save(checkpoint.rng_state(), folder / f"rng_{trainer.rank:03d}.pt")
    if trainer.sharded:
        trainer.accelerator.save_state(str(folder / "engine"))


def find(trainer: Any) -> checkpoint.Found | None:
    """The checkpoint that `resume` asks for, verified, of a recipe that can go on; no model is loaded for it.

    Raises ValueError in every process where it cannot.
    """
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [None, None]
    if trainer.main:
        try:
            checkpoint.sweep(trainer.checkpoints)
            answer[0] = found = checkpoint.find(trainer.checkpoints, trainer.config.resume)
            if found is not None:
                state = checkpoint.read_state(found.folder)
                named = changes.check(state, trainer.config, trainer.world, trainer.stamps, found.folder)
                for sentence in named:
                    logger.warning("%s", sentence)
        except ValueError as error:
            answer = [None, str(error)]
    if trainer.world > 1:
        broadcast_object_list(answer)
    if answer[1]:
        raise ValueError(answer[1])
    return answer[0]


def read(trainer: Any, found: checkpoint.Found | None) -> None:
    """Go on from this checkpoint, if any. Raises ValueError if it does not fit the model."""
    if found is None:
        return
    folder = found.folder
    state = checkpoint.read_state(folder)
    if trainer.sharded:
        trainer.accelerator.load_state(str(folder / "engine"))
    else:
        values = checkpoint.read_tensors(folder, "trained.safetensors")
        checkpoint.copy_into(trainer.names, values, str(folder))
        _read_optimizer(trainer, found)
        _read_average(trainer, found, state)
    rng = f"rng_{trainer.rank:03d}.pt"
    if found.has(rng):
        checkpoint.set_rng_state(torch.load(folder / rng, weights_only=True))
    else:
        logger.warning("%s has no %s: the dropout of process %d begins anew", folder, rng, trainer.rank)
    if state["data"] != trainer.batches.fingerprint():
        logger.warning("the data changed since %s was written: the rows come in another order", folder)
    trainer.step, trainer.micro = state["step"], state["micro"]
    trainer.load_extra(found, state)
    if trainer.main:
        logger.info("resumed at step %d from %s", trainer.step, folder)


def _read_optimizer(trainer: Any, found: checkpoint.Found) -> None:
    if not found.has("optimizer.pt"):
        logger.warning("%s has no optimizer.pt: the optimiser's moments begin anew", found.folder)
        return
    moments = torch.load(found.folder / "optimizer.pt", map_location="cpu", weights_only=True)
    wanted = [{name: group[name] for name in ("betas", "weight_decay")} for group in _groups(trainer)]
    trainer.optimizer.load_state_dict(moments)
    for group, values in zip(_groups(trainer), wanted, strict=True):
        group.update(values)  # the recipe's, where it was changed since; the moments stay


def _groups(trainer: Any) -> list[dict[str, Any]]:
    return trainer.optimizer.param_groups


def _read_average(trainer: Any, found: checkpoint.Found, state: dict[str, Any]) -> None:
    if trainer.average is None:
        return
    if found.has("ema.safetensors"):
        averages = checkpoint.read_tensors(found.folder, "ema.safetensors")
        trainer.average.values = {k: v.to(trainer.accelerator.device) for k, v in averages.items()}
        trainer.average.updates = state["ema_updates"]
        return
    logger.warning("%s has no ema.safetensors: the average begins at the present weights", found.folder)
    trainer.average.restart(trainer.names)
