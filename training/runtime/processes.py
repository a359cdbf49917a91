"""accelerate as the trainers use it: one `Accelerator` per run, whatever ran in this process before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .precision import bf16_is_fast

Progress = Callable[[Iterable, str], Iterable]  # wraps a loop over items under a label, as tqdm does


def silent(items: Iterable, label: str) -> Iterable:
    """No progress bar."""
    return items


@dataclass(frozen=True)
class Processes:
    """The processes of one run; sharded: the weights lie in pieces among them (FSDP, DeepSpeed)."""

    accelerator: Any
    sharded: bool = False

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """How many processes there are."""
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    def wait(self) -> None:
        """Go on when all have come here."""
        self.accelerator.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any of them; all call it."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        return bool(self.accelerator.reduce(value, "sum") > 0)


def start(config: Any, logs: Path) -> Processes:
    """accelerate set up for a run, with its trackers' files in `logs`.

    Raises ValueError for options that sharding does not allow.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    if AcceleratorState._shared_state and PartialState().num_processes == 1:
        # An earlier run in this process (ComfyUI, tests) may have had another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision=_precision(config.mixed_precision),
        gradient_accumulation_steps=config.accumulation,
        log_with=[t for t in config.log_with if t != "none"] or None,
        project_dir=str(logs),
    )
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        # accelerate takes it from a prepared loader; ours is not one.
        plugin = accelerator.state.deepspeed_plugin.deepspeed_config
        plugin["train_micro_batch_size_per_gpu"] = config.batch_size
        plugin["gradient_clipping"] = config.grad_clip  # the engine clips, and steps in `backward`
        plugin["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # for the export
    sharded = kind in ("FSDP", "DEEPSPEED")
    if sharded and config.ema:
        raise ValueError(f"ema is {config.ema} under {kind}: set ema: 0, the shards keep no average")
    return Processes(accelerator, sharded)


def _precision(choice: str) -> str:
    """accelerate's name for it; "auto" is bf16 where the device has units for that."""
    from accelerate.utils import parse_flag_from_env

    if choice != "auto":
        return choice
    # Not asked of PartialState: made too early, it takes every process for the only one.
    gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    return "bf16" if bf16_is_fast("cuda" if gpu else "cpu") else "no"


def open_trackers(accelerator: Any, config: Any) -> None:
    """TensorBoard and others, with the configuration as flat values."""
    if accelerator.is_main_process and accelerator.log_with:
        plain = (int, float, str, bool)
        flat = {k: v if isinstance(v, plain) else str(v) for k, v in vars(config).items()}
        accelerator.init_trackers("diptych", config=flat)
