"""What a checkpoint of a run holds and how a run goes on from it. Getting it to disk: `checkpoint.py`."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from . import checkpoint

logger = logging.getLogger(__name__)


def write(trainer: Any) -> Path:
    """Write a checkpoint of the trainer's present step; all processes call it. Returns its folder."""
    writer = checkpoint.Writer(trainer.output / "checkpoints", trainer.step, trainer.config.keep_last)
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
            }
        )
        together()
    together()
    return writer.final


def _own_part(trainer: Any, folder: Path) -> None:
    """What every process writes: its generators, and its shards if the engine shards."""
    torch.save(checkpoint.rng_state(), folder / f"rng_{trainer.rank:03d}.pt")
    if trainer.sharded:
        trainer.accelerator.save_state(str(folder / "engine"))


def read(trainer: Any) -> None:
    """Go on from the checkpoint that `resume` names, if any. Raises ValueError if it does not fit."""
    folder = checkpoint.find(trainer.output / "checkpoints", trainer.config.resume)
    if folder is None:
        return
    state = checkpoint.read_state(folder)
    if state["world"] != trainer.world:
        logger.warning("%s is of %d processes, now there are %d", folder, state["world"], trainer.world)
    if trainer.sharded:
        trainer.accelerator.load_state(str(folder / "engine"))
    else:
        values = checkpoint.read_tensors(folder, "trained.safetensors")
        checkpoint.copy_into(trainer.names, values, str(folder))
        moments = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        trainer.optimizer.load_state_dict(moments)
        if trainer.average is not None and (folder / "ema.safetensors").is_file():
            averages = checkpoint.read_tensors(folder, "ema.safetensors")
            trainer.average.values = {k: v.to(trainer.accelerator.device) for k, v in averages.items()}
            trainer.average.updates = state["ema_updates"]
    rng = folder / f"rng_{trainer.rank:03d}.pt"
    if rng.is_file():
        checkpoint.set_rng_state(torch.load(rng, weights_only=True))
    if state["data"] != trainer.batches.fingerprint():
        logger.warning("the data changed since %s was written: the rows come in another order", folder)
    trainer.step, trainer.micro = state["step"], state["micro"]
    trainer.load_extra(folder, state)
    logger.info("resumed at step %d from %s", trainer.step, folder)
