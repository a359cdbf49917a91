"""Supervised training of Fill, Kontext and SD inpainting: LoRA, MoE-LoRA or full, on accelerate.

The story in order: checks -> encoders -> caches -> denoiser and what is trained of it -> resume -> steps ->
export. Data order, noise, sigma and prompt drop are functions of (seed, position), so a resumed run continues
bit-equal and two processes see what one with twice the batch sees. Data stand in `data/`, model families and
losses in `tasks/`, checkpoints in `runtime/`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .callbacks import Callbacks, Report
from .config import TrainConfig
from .data import dataset, prior
from .data.sources import open_source
from .evaluate import preview, report, run_folder
from .runtime import changes, checkpoint, disk, lock, optim, processes, resume
from .runtime.attention import for_learning
from .runtime.checkpoint import TrainingError
from .runtime.random_streams import row_noise, row_uniform
from .tasks import export, losses, moe
from .tasks.families import make_task
from .trained import prepare_model

logger = logging.getLogger(__name__)

TASK_STATE = "task.safetensors"  # in a checkpoint, of a task that has a state
CLASS_ROWS = 1 << 40  # where class rows take their numbers in the random stream; instance rows count from 0


@dataclass
class Position:
    """How far a run is.

    step: optimiser steps that were made. micro: micro-batches that were drawn, which is the cursor of the
    data. begun: the micro-batch at which the present step began. kept: the last step in a checkpoint.
    updating: the weights are between two steps.
    """

    step: int = 0
    micro: int = 0
    begun: int = 0
    kept: int = 0
    updating: bool = False


class Diverged(TrainingError):
    """The weights of the last step are not worth keeping."""


class Trainer:
    """One training run; `run()` does all. `callbacks` are the fields of `Callbacks`.

    `prepare()` sets `processes`, `task`, `data` (a `dataset.PreparedData`), `model` (a `TrainedModel`).
    """

    def __init__(self, config: TrainConfig, **callbacks: Any):
        self.config = config
        self.callbacks = Callbacks(**{name: call for name, call in callbacks.items() if call is not None})
        self.output = Path(config.output_dir)
        self.checkpoints = self.output / "checkpoints"
        self.position = Position()

    @property
    def step(self) -> int:
        """Optimiser steps that were made."""
        return self.position.step

    @property
    def accelerator(self) -> Any:
        """accelerate's, of this process."""
        return self.processes.accelerator

    def run(self) -> Path:
        """Prepare, train, save.

        Returns the LoRA file or the diffusers folder; the last checkpoint's folder (the output folder if
        there is none) if it was stopped. Whatever ends it, the steps that were made are kept.
        """
        disk.check_folder(self.output, "output_dir")
        with lock.held(self.output):
            self.prepare()
            try:
                if self._steps():
                    path = self.export()
                    self._tell(path)
                else:
                    path = next(reversed(checkpoint.folders(self.checkpoints)), self.output)
            except Diverged:
                raise
            except TrainingError as error:
                kept = self._rescue()
                raise error if kept in str(error) else TrainingError(f"{error}; {kept}") from error
            except OSError as error:
                raise TrainingError(f"stopped at step {self.step} ({error}): {self._rescue()}") from error
            except Exception:
                logger.warning("stopped at step %d: %s", self.step, self._rescue())
                raise
            self.accelerator.end_training()
        return path

    def prepare(self) -> None:
        """Everything before the first step. All errors of the recipe and the data come from here."""
        c, corpora = self.config, self._open()
        found = resume.find(c, self.processes, self.options_content, self.checkpoints)
        self.check()
        self.output.mkdir(parents=True, exist_ok=True)
        bar = self.callbacks.progress if self.processes.main else processes.silent
        self.task.load_encoders()
        if c.class_images:  # the data are whole only when the class images are made
            prior.prepare(self.task, c, self.processes, bar)
            corpora = dataset.open_data(c, self.task.default_template)
        self.data = dataset.prepare(corpora, self.task, self.processes, bar)
        if not c.train_text_encoder and c.cache:
            self.task.free_text()
        torch.manual_seed(c.seed)  # every process makes the same new weights ...
        self._prepare_model()
        torch.manual_seed(c.seed * 1_000_003 + self.processes.rank)  # ... and drops out others
        processes.open_trackers(self.accelerator, c)
        if found is not None:
            values = resume.read(found, self._state())
            step = values["step"]
            self.position = Position(step, values["micro"], kept=step)
            self.load_extra(found, values)
        resume.check_room(self._state(), self.checkpoints)
        self.order = self.data.order(self.position.micro)

    def _open(self) -> dataset.Corpora | None:
        """All that can be looked at before a weight is read: places, options, data (None: not whole yet)."""
        c = self.config
        if c.threads:
            torch.set_num_threads(c.threads)
        disk.check_folder(self.output, "output_dir", need=resume.ROOM)
        if c.cache:
            disk.check_folder(c.cache_dir or self.output / "cache", "cache_dir")
        prior.check(c)
        optim.check(c)
        self.processes = processes.start(c, self.output / "logs")
        self.task = make_task(c, self.processes.device)
        if self.processes.sharded:  # a model that needs sharding fits no single device
            self.task.load_device = torch.device("cpu")
        self.options_content = changes.stamps(c, self.task.denoiser_part)
        if not c.class_images:
            return dataset.open_data(c, self.task.default_template)
        open_source(list(c.data), c.seed)
        return None

    def _prepare_model(self) -> None:
        """Load what is trained, and make it trainable."""
        self.model = prepare_model(self.task, self.config, self.processes)

    def _steps(self) -> bool:
        """All steps that are left; False if it was stopped before the end, after a checkpoint."""
        c, at = self.config, self.position
        started, first, reported = time.monotonic(), at.step, at.step
        running = torch.zeros((), device=self.processes.device)
        stop = self._stopping()  # from now on whoever wants a stop need only say so
        while at.step < c.max_steps and not stop:
            at.begun = at.micro
            loss, norm = self.train_step()
            at.updating = False
            running += loss
            last = at.step == c.max_steps or self._settled()
            if self.processes.main and self.callbacks.on_step is not None:
                self.callbacks.on_step(at.step)
            if at.step % c.log_every == 0 or last:
                mean = float(self.accelerator.reduce(running, "mean")) / (at.step - reported)
                running.zero_()
                reported = at.step
                self._report(mean, norm, (time.monotonic() - started) / (at.step - first))
            stop = self._stopping()
            if at.step % c.save_every == 0 or last or stop:
                self.save()
            if c.sample_every and (at.step % c.sample_every == 0 or last) and not stop:
                self.sample()
            if last:
                return True
        return not stop

    def train_step(self) -> tuple[Tensor, float]:
        """One optimiser step; returns (mean loss of this process, gradient norm before clipping)."""
        c, model = self.config, self.model
        optim.set_lr(model.optimizer, self.step, c)
        total = torch.zeros((), device=self.processes.device)
        norm: Any = float("nan")
        for _ in range(c.accumulation):
            with self.accelerator.accumulate(*model.prepared.values()):
                batch, noise, u = self._batch()
                with for_learning(noise):
                    loss = self._loss(batch, noise, u)
                    self.accelerator.backward(loss)
                total += loss.detach() / c.accumulation
                if self.accelerator.sync_gradients:
                    norm = self._clip(total)
                self.position.updating = self.accelerator.sync_gradients
                model.optimizer.step()
                model.optimizer.zero_grad()
        self.position.step += 1
        if model.average is not None:
            model.average.update(model.parameters)
        return total, norm

    def _batch(self) -> tuple[dict[str, Any], Tensor, Tensor]:
        """The next micro-batch of this process: tensors, noise and one uniform number per row."""
        c, at = self.config, self.position
        first = (at.micro * self.processes.world + self.processes.rank) * c.batch_size
        numbers = next(self.order)
        positions = [first + i for i in range(c.batch_size)]
        if len(numbers) > c.batch_size:
            positions += [p + CLASS_ROWS for p in positions]
        at.micro += 1
        drop = (row_uniform(c.seed, positions, "drop") < c.prompt_drop).tolist()
        return *self._with_noise(numbers, drop, positions), row_uniform(c.seed, positions, "sigma")

    def _with_noise(
        self, numbers: list[int], drop: list[bool], positions: list[int]
    ) -> tuple[dict[str, Any], Tensor]:
        """The tensors of these rows and the noise of these places in the random stream, on the device."""
        batch = self.data.batches(numbers, drop) | self.task.draw(self.config.seed, positions)
        batch = self._to_device(batch)
        noise = row_noise(self.config.seed, positions, self.task.noise_shape(batch), self.config.noise_offset)
        return batch, noise.to(self.processes.device)

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch on the device, with its text encoded where the text encoders are trained."""
        batch = {k: v.to(self.processes.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if self.config.train_text_encoder:
            batch |= {k: v.float() for k, v in self.task.encode_text(batch["prompts"]).items()}
        return batch

    def _loss(self, batch: dict[str, Any], noise: Tensor, u: Tensor) -> Tensor:
        """Mean loss of a micro-batch; u: one uniform number per row, from which its noise level follows."""
        rows = self.task.row_losses(batch, noise, u)
        loss = losses.total(rows, batch["prior"], self.config.prior.weight if self.config.prior else 1.0)
        if self.config.method == "moe_lora" and self.config.moe_gate == "softmax_all":
            balance = moe.balance_loss(self.model.parts[self.task.denoiser_part])
            if balance is not None:
                loss = loss + self.config.moe_balance * balance
        return loss

    def _clip(self, loss: Tensor) -> float:
        """Limit the gradient's norm to `grad_clip`; returns what it was. Raises Diverged."""
        parameters = list(self.model.parameters.values())
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.grad_clip or float("inf"))
        return self._finite(0.0 if norm is None else norm, loss)

    def _finite(self, norm: float | Tensor, loss: Tensor) -> float:
        """The gradient's norm as a number. Raises Diverged if it is not finite.

        But in fp16, where the loss scale overflows now and then: the scaler skips that step and lowers the
        scale, and only a scale that has come down to nothing shows that the gradient itself is broken.
        """
        norm, scaler = float(norm), self.accelerator.scaler
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            raise Diverged(
                f"loss is {float(loss)} and its gradient is not finite at step {self.step + 1}: lower lr or "
                f"grad_clip, or look for broken images; {checkpoint.last_good(self.checkpoints)}"
            )
        return norm

    def _stopping(self) -> bool:
        """Whether any process was asked to stop."""
        return self.processes.any(self.callbacks.should_stop())

    def _report(self, loss: float, norm: float, pace: float) -> None:
        """Log the mean loss, the last gradient's norm and the pace (seconds per step)."""
        if not self.processes.main:
            return
        c = self.config
        told = Report(
            step=self.step,
            steps=c.max_steps,
            loss=loss,
            grad_norm=norm,
            lr=self.model.optimizer.param_groups[0]["lr"],
            rows_per_second=c.batch_size * c.accumulation * self.processes.world / pace,
            seconds_left=pace * (c.max_steps - self.step),
        )
        line = dataclasses.asdict(told) | self.task.told()
        self.accelerator.log({k: v for k, v in line.items() if k not in ("step", "steps")}, step=self.step)
        with open(self.output / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.callbacks.on_report is not None:
            self.callbacks.on_report(told)

    def save(self) -> Path:
        """Write a checkpoint of the present step; all processes call it."""
        path = resume.write(self._state(), self.checkpoints)
        self.position.kept = self.step
        self._tell()
        return path

    def _tell(self, result: Path | None = None) -> None:
        """Write `run.json` and `report.html` as of now; no failure of theirs ends a training."""
        if self.processes.main:
            try:
                run_folder.note(self.config, self.step, self.callbacks.command, result)
            except (OSError, ValueError) as error:
                logger.warning("%s could not be written (%s)", self.output / run_folder.NOTE, error)
            report.attempt(self.output)

    def _state(self) -> resume.RunState:
        """All that a checkpoint of this moment keeps."""
        model, at = self.model, self.position
        return resume.RunState(
            self.config,
            self.processes,
            model.parameters,
            model.optimizer,
            model.average,
            at.step,
            at.micro,
            self.data.batches.fingerprint(),
            self.options_content,
            self.extra_tensors(),
            self.extra_state(),
        )

    def _rescue(self) -> str:
        """Keep the steps since the last checkpoint, in output_dir or elsewhere; what is to be said of it."""
        at = self.position
        if self.processes.world > 1 or at.updating or at.step == at.kept:
            return checkpoint.last_good(self.checkpoints)
        at.micro = at.begun
        return resume.rescue(self._state(), self.checkpoints)

    def sample(self) -> None:
        """Sample images, with the averaged weights if there are any, as `samples/step_*.png`."""
        if not self.processes.main and not self.processes.sharded:
            return
        c, task, batches = self.config, self.task, self.data.sample_batches

        def make_batch(numbers: list[int]) -> dict[str, Any]:
            batch = self._to_device(batches(numbers, [False] * len(numbers)))
            return task.guided(batch, batches.text, c.sample_guidance)

        modules = (self.model.parts, self.model.prepared)
        with self.model.averaged(), preview.for_sampling(task, *modules, self.processes.sharded):
            sheet = preview.sample_sheet(task, batches, make_batch, seed=c.seed, count=c.sample_count)
        if self.processes.main:
            preview.write(sheet, self.output / "samples" / f"step_{self.step:08d}.png")
            preview.track(self.accelerator.trackers, sheet, self.step)
            if self.callbacks.on_sample is not None:
                self.callbacks.on_sample(self.step, sheet)
            report.attempt(self.output)

    def header(self) -> dict[str, Any]:
        """The `diptych` block of saved files."""
        c = self.config
        return {
            "base": c.model,
            "algorithm": "sft",
            "task": c.task,
            "recipe": c.recipe,
            "step": self.step,
            "data": self.data.batches.fingerprint(),
            "prompt_template": self.data.template,
        }

    def final_weights(self) -> AbstractContextManager:
        """Inside the block the model has the weights that are exported: averaged, if there is an average."""
        return self.model.averaged()

    def export(self) -> Path:
        """Write the final weights: a LoRA file or a diffusers folder."""
        with self.final_weights():
            self.task.measure(self.data.batches)
            parts = (self.model.parts, self.model.prepared)
            path = export.write_run(self.config, self.output, *parts, self.processes, self.header())
        self.processes.wait()
        return path

    # What another kind of training overrides, beside the methods above. A task's own state is kept here too.

    def check(self) -> None:
        """What another kind of training refuses before anything is loaded."""

    def _settled(self) -> bool:
        """Whether more steps would not help; the run is finished then."""
        return False

    def extra_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What another kind of training keeps beside, {file name: tensors}."""
        state = self.task.state()
        return {TASK_STATE: state} if state else {}

    def extra_state(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {}

    def load_extra(self, found: checkpoint.Found, state: dict[str, Any]) -> None:
        """Read back what `extra_tensors` and `extra_state` gave."""
        if self.task.state():
            self.task.load_state(checkpoint.read_tensors(found.folder, TASK_STATE))
