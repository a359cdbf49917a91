"""What a run trains: modules with their adapters, as accelerate wraps them, their optimiser and average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .runtime import optim
from .runtime.processes import Processes
from .tasks import adapters, initial


@dataclass(frozen=True)
class TrainedModel:
    """The modules of a run.

    parts: denoiser and, if they are trained, text encoders, by the name of their folder. prepared: the same
    as accelerate wraps them for several processes. parameters: what is trained of them, by "part/name",
    float32.
    """

    parts: dict[str, nn.Module]
    prepared: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    optimizer: Any
    average: optim.MovingAverage | None = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in place of the trained weights inside the block, if there is one."""
        if self.average is not None:
            self.average.swap(self.parameters)
        try:
            yield
        finally:
            if self.average is not None:
                self.average.swap(self.parameters)


def prepare_model(task: Any, config: Any, processes: Processes) -> TrainedModel:
    """Load the denoiser, unless it is there, and make it, and the text encoders if asked, trainable.

    task: of `tasks/`; its host runs the prepared denoiser afterwards. Raises ValueError if nothing is left
    to train.
    """
    module = task.module if task.module is not None else task.load_denoiser()
    parts: dict[str, nn.Module] = {task.denoiser_part: module}
    if config.train_text_encoder:
        parts |= {name: part for name, part in task.parts.items() if isinstance(part, nn.Module)}
    for name, part in parts.items():
        adapters.attach(part, task.targets(name), config)
    task.freeze(module)
    if config.init_lora:
        initial.from_lora(module, config.init_lora, config)
    parameters = adapters.named(parts)
    optimizer = optim.make_optimizer(parameters.values(), config)
    *modules, optimizer = processes.accelerator.prepare(*parts.values(), optimizer)
    prepared = dict(zip(parts, modules, strict=True))
    if processes.sharded:  # FSDP2 replaces the parameters
        parameters = adapters.named(prepared)
    if config.train_text_encoder:
        task.parts |= {name: part for name, part in prepared.items() if name != task.denoiser_part}
    task.make_host(prepared[task.denoiser_part])
    average = optim.MovingAverage(parameters, config.ema) if config.ema else None
    return TrainedModel(parts, prepared, parameters, optimizer, average)
