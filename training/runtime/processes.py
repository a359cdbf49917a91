"""accelerate as the trainer uses it: one `Accelerator` per run, whatever ran in this process before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .precision import bf16_is_fast


def open_accelerator(config: Any, logs: Path) -> tuple[Any, bool]:
    """The accelerator of a run, and whether it shards the weights (FSDP, DeepSpeed).

    Raises ValueError for options that sharding does not allow.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import parse_flag_from_env

    if AcceleratorState._shared_state and PartialState().num_processes == 1:
        # An earlier run in this process (ComfyUI, tests) may have had another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
    precision = config.mixed_precision
    if (
        precision == "auto"
    ):  # not asked of PartialState: made too early, it takes every process for the only one
        gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        precision = "bf16" if bf16_is_fast("cuda" if gpu else "cpu") else "no"
    accelerator = Accelerator(
        mixed_precision=precision,
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
    return accelerator, sharded


def open_trackers(accelerator: Any, config: Any) -> None:
    """TensorBoard and others, with the configuration as flat values."""
    if accelerator.is_main_process and accelerator.log_with:
        plain = (int, float, str, bool)
        flat = {k: v if isinstance(v, plain) else str(v) for k, v in vars(config).items()}
        accelerator.init_trackers("diptych", config=flat)
