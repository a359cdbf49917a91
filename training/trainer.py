"""Supervised training of Fill, Kontext and SD inpainting: LoRA, MoE-LoRA or full, on accelerate.

The story in order: checks -> encoders -> caches -> denoiser and what is trained of it -> resume -> steps ->
export.
Data order, noise, sigma and prompt drop are functions of (seed, position), so a resumed run continues
bit-equal and two processes see what one with twice the batch sees. Losses stand in `losses.py`, model
families in `tasks.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .data import dataset, encode, prior
from .data.sources import open_source
from .evaluate import preview
from .runtime import changes, checkpoint, disk, lock, optim, processes, resume
from .runtime.attention import for_learning
from .runtime.checkpoint import TrainingError
from .runtime.random_streams import row_noise, row_uniform
from .tasks import adapters, export, initial, losses
from .tasks.families import make_task

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Report:
    """One log line: mean loss since the last one, gradient norm, learning rate, rows per second, seconds
    left."""

    step: int
    steps: int
    loss: float
    grad_norm: float
    lr: float
    rows_per_second: float
    seconds_left: float


class Diverged(TrainingError):
    """The weights of the last step are not worth keeping."""


class Trainer:
    """One training run. `run()` does all; `on_report`, `on_sample` and `should_stop` are for faces (CLI,
    node)."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        on_report: Callable[[Report], None] | None = None,
        on_step: Callable[[int], None] | None = None,
        on_sample: Callable[[int, Tensor], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        progress: Callable[[Any, str], Any] | None = None,
    ):
        self.config = config
        self.on_report, self.on_step, self.on_sample = on_report, on_step, on_sample
        self.should_stop = should_stop or (lambda: False)
        self.progress = progress or (lambda items, label: items)
        self.output = Path(config.output_dir)
        self.checkpoints = self.output / "checkpoints"
        self.step = self.micro = 0
        self.kept = self.begun = (
            0  # the last step in a checkpoint; the micro-batch that the present step began at
        )
        self.updating = False  # whether the weights are between two steps
        self.accelerator: Any = None
        self.notes: list[str] = []  # for the report: what was done to the data

    # ---------------------------------------------------------------- preparation

    def open(self) -> None:
        """Everything that can be looked at before a weight is read: places, options, the checkpoint."""
        c = self.config
        if self.accelerator is not None:
            return
        if c.threads:
            torch.set_num_threads(c.threads)
        disk.check_folder(self.output, "output_dir", need=resume.ROOM)
        if c.cache:
            disk.check_folder(c.cache_dir or self.output / "cache", "cache_dir")
        prior.check(c)
        optim.check(c)
        self.accelerator, self.sharded = processes.open_accelerator(c, self.output / "logs")
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.bar = self.progress if self.main else dataset.silent
        self.task = make_task(c, self.accelerator.device)
        self.stamps = changes.stamps(c, self.task.denoiser_part)
        self.found = resume.find(self)
        # With class pictures the data are whole only when those are made.
        self.data = None if c.class_images else encode.open_data(self)
        if c.class_images:
            open_source(list(c.data), c.seed)
        self.check()

    def prepare(self) -> None:
        """Everything before the first step. All errors of the recipe and the data come from here."""
        c = self.config
        self.open()
        self.output.mkdir(parents=True, exist_ok=True)
        if self.sharded:  # a model that needs sharding fits no single device
            self.task.load_device = torch.device("cpu")
        self.task.load_encoders()
        prior.prepare(self)  # class pictures, made before anything is trained
        encode.prepare(self)
        if not c.train_text_encoder and c.cache:
            self.task.free_text()
        torch.manual_seed(c.seed)  # every process makes the same new weights ...
        self._prepare_model()
        torch.manual_seed(c.seed * 1_000_003 + self.rank)  # ... and drops out others
        processes.open_trackers(self.accelerator, c)
        resume.read(self, self.found)
        resume.check_room(self)
        self.kept = self.step
        # The cursor of the data is the number of micro-batches: the order is a function of it.
        self.order = iter(self.sampler.start_at(self.micro))
        if self.class_sampler is not None:
            self.class_order = iter(self.class_sampler.start_at(self.micro))

    def check(self) -> None:
        """What another kind of training refuses before anything is loaded."""

    def _prepare_model(self) -> None:
        c = self.config
        module = self.task.module if self.task.module is not None else self.task.load_denoiser()
        parts: dict[str, nn.Module] = {self.task.denoiser_part: module}
        if c.train_text_encoder:
            parts |= {n: p for n, p in self.task.parts.items() if isinstance(p, nn.Module)}
        for name, part in parts.items():
            adapters.attach(part, self.task.targets(name), c)
        if c.init_lora:
            initial.from_lora(module, c.init_lora, c)
        self.parts, self.names = parts, adapters.named(parts)
        optimizer = optim.make_optimizer(self.names.values(), c)
        prepared = self.accelerator.prepare(*parts.values(), optimizer)
        self.optimizer = prepared[-1]
        self.prepared = dict(zip(parts, prepared[:-1], strict=True))
        if self.sharded:  # FSDP2 replaces the parameters
            self.names = adapters.named(self.prepared)
        if c.train_text_encoder:
            self.task.parts |= {n: m for n, m in self.prepared.items() if n != self.task.denoiser_part}
        self.task.make_host(self.prepared[self.task.denoiser_part])
        self.average = optim.MovingAverage(self.names, c.ema) if c.ema else None

    # ---------------------------------------------------------------- checkpoints

    def extra_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What another kind of training keeps beside, {file name: tensors}."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {}

    def load_extra(self, found: checkpoint.Found, state: dict[str, Any]) -> None:
        """Read back what `extra_tensors` and `extra_state` gave."""

    def save(self) -> Path:
        """Write a checkpoint of the present step; all processes call it."""
        path = resume.write(self)
        self.kept = self.step
        return path

    # ---------------------------------------------------------------- steps

    def _batch(self) -> tuple[dict[str, Any], Tensor, Tensor]:
        """The next micro-batch of this process: tensors, noise and one uniform number per row."""
        c = self.config
        first = self.micro * c.batch_size * self.world + self.rank * c.batch_size
        positions = [first + i for i in range(c.batch_size)]
        numbers = next(self.order)
        if self.class_sampler is not None:
            numbers = numbers + next(self.class_order)
            positions += [p + (1 << 40) for p in positions]  # another stretch of the random stream
        self.micro += 1
        drop = (row_uniform(c.seed, positions, "drop") < c.prompt_drop).tolist()
        return *self._with_noise(numbers, drop, positions), row_uniform(c.seed, positions, "sigma")

    def _with_noise(
        self, numbers: list[int], drop: list[bool], positions: list[int]
    ) -> tuple[dict[str, Any], Tensor]:
        """The tensors of these rows and the noise of these places in the random stream, on the device."""
        batch = self._to_device(self.batches(numbers, drop) | self.task.draw(self.config.seed, positions))
        shape = tuple(batch["latents"].shape[1:])
        noise = row_noise(self.config.seed, positions, shape, self.config.noise_offset)
        return batch, noise.to(self.accelerator.device)

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = {k: v.to(self.accelerator.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if self.config.train_text_encoder:
            batch |= {k: v.float() for k, v in self.task.encode_text(batch["prompts"]).items()}
        return batch

    def _loss(self, batch: dict[str, Any], noise: Tensor, u: Tensor) -> Tensor:
        rows = self.task.row_losses(batch, noise, u)
        loss = losses.total(rows, batch["prior"], self.config.prior.weight if self.config.prior else 1.0)
        if self.config.method == "moe_lora" and self.config.moe_gate == "softmax_all":
            balance = adapters.balance_loss(self.parts[self.task.denoiser_part])
            if balance is not None:
                loss = loss + self.config.moe_balance * balance
        return loss

    def train_step(self) -> tuple[Tensor, float]:
        """One optimiser step; returns (mean loss of this process, gradient norm before clipping)."""
        c = self.config
        optim.set_lr(self.optimizer, self.step, c)
        total = torch.zeros((), device=self.accelerator.device)
        norm: Any = float("nan")
        for _ in range(c.accumulation):
            with self.accelerator.accumulate(*self.prepared.values()):
                batch, noise, u = self._batch()
                with for_learning(noise):
                    loss = self._loss(batch, noise, u)
                    self.accelerator.backward(loss)
                total += loss.detach() / c.accumulation
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(
                        list(self.names.values()), c.grad_clip or float("inf")
                    )
                    norm = self._finite(0.0 if norm is None else norm, total)
                self.updating = self.accelerator.sync_gradients
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.step += 1
        if self.average is not None:
            self.average.update(self.names)
        return total, norm

    def _last_good(self) -> str:
        complete = checkpoint.folders(self.checkpoints)
        return (
            f"the last good checkpoint {complete[-1]} is intact" if complete else "there is no checkpoint yet"
        )

    def _finite(self, norm: float | Tensor, loss: Tensor) -> float:
        """The gradient's norm as a number. Raises Diverged if it is not finite.

        But in fp16, where the loss scale overflows now and then: the scaler skips that step and lowers the
        scale, and only a scale that has come down to nothing shows that the gradient itself is broken.
        """
        norm, scaler = float(norm), self.accelerator.scaler
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            raise Diverged(
                f"loss is {float(loss)} and its gradient is not finite at step {self.step + 1}: lower lr or "
                f"grad_clip, or look for broken pictures; {self._last_good()}"
            )
        return norm

    def _rescue(self) -> str:
        """Keep the steps since the last checkpoint, in output_dir or elsewhere; what is to be said of it."""
        if self.world > 1 or self.updating or self.step == self.kept:
            return self._last_good()
        self.micro = self.begun
        for root in (self.checkpoints, *disk.places(Path(f"{self.output.resolve().name}_checkpoints"))):
            try:
                folder = resume.write_alone(self, root)
            except (TrainingError, OSError):
                if root != self.checkpoints:
                    shutil.rmtree(root, ignore_errors=True)
                continue
            how = "auto" if root == self.checkpoints else folder
            return f"step {self.step} is kept in {folder}, go on from it with resume: {how}"
        return self._last_good()

    def run(self) -> Path:
        """Prepare, train, save.

        Returns the LoRA file or the diffusers folder; the last checkpoint's folder (the output folder if
        there is none) if it was stopped. Whatever ends it, the steps that were made are kept.
        """
        disk.check_folder(self.output, "output_dir")
        with lock.held(self.output):
            self.prepare()
            try:
                path = self.export() if self._steps() else self._last_checkpoint()
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

    def _last_checkpoint(self) -> Path:
        return next(reversed(checkpoint.folders(self.checkpoints)), self.output)

    def _steps(self) -> bool:
        """All steps that are left; False if it was stopped before the end, after a checkpoint."""
        c = self.config
        started, at, since = time.monotonic(), self.step, self.step
        running = torch.zeros((), device=self.accelerator.device)
        stop = self._stopping()  # from now on whoever wants a stop need only say so
        while self.step < c.max_steps and not stop:
            self.begun = self.micro
            loss, norm = self.train_step()
            self.updating = False
            running += loss
            last = self.step == c.max_steps or self._settled()
            if self.main and self.on_step is not None:
                self.on_step(self.step)
            if self.step % c.log_every == 0 or last:
                mean = float(self.accelerator.reduce(running, "mean")) / (self.step - since)
                running.zero_()
                pace = (time.monotonic() - started) / (self.step - at)
                self._report(mean, norm, pace)
                since = self.step
            stop = self._stopping()
            if self.step % c.save_every == 0 or last or stop:
                self.save()
            if c.sample_every and (self.step % c.sample_every == 0 or last) and not stop:
                self.sample()
            if last:
                return True
        return not stop

    def _settled(self) -> bool:
        """Whether more steps would not help; the run is finished then."""
        return False

    def _stopping(self) -> bool:
        """Whether any process was asked to stop."""
        if self.world == 1:
            return self.should_stop()
        flag = torch.tensor(float(self.should_stop()), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _report(self, loss: float, norm: float, pace: float) -> None:
        if not self.main:
            return
        c = self.config
        report = Report(
            step=self.step,
            steps=c.max_steps,
            loss=loss,
            grad_norm=norm,
            lr=self.optimizer.param_groups[0]["lr"],
            rows_per_second=c.batch_size * c.accumulation * self.world / pace,
            seconds_left=pace * (c.max_steps - self.step),
        )
        values = {k: v for k, v in dataclasses.asdict(report).items() if k not in ("step", "steps")}
        self.accelerator.log(values, step=self.step)
        with open(self.output / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(report)) + "\n")
        if self.on_report is not None:
            self.on_report(report)

    # ---------------------------------------------------------------- results

    def sample(self) -> None:
        """Sample pictures, with the averaged weights if there are any, as `samples/step_*.png`."""
        if not self.main and not self.sharded:
            return
        with self.averaged(), preview.for_sampling(self):
            sheet = preview.contact_sheet(self.task, self.sample_batches, self.config.seed, self._to_device)
        if self.main:
            preview.write(sheet, self.output / "samples" / f"step_{self.step:08d}.png")
            preview.track(self.accelerator, sheet, self.step)
            if self.on_sample is not None:
                self.on_sample(self.step, sheet)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in place of the trained weights inside the block, if there is one."""
        average = self.average
        if average is not None:
            average.swap(self.names)
        try:
            yield
        finally:
            if average is not None:
                average.swap(self.names)

    def header(self) -> dict[str, Any]:
        """The `diptych` block of saved files."""
        c = self.config
        return {
            "base": c.model,
            "algorithm": "sft",
            "task": c.task,
            "recipe": c.recipe,
            "step": self.step,
            "data": self.batches.fingerprint(),
            "prompt_template": self.template,
        }

    def export(self) -> Path:
        """Write the final weights (averaged if there is an average): a LoRA file or a diffusers folder."""
        with self.averaged():
            path = export.write_run(self)
        self.accelerator.wait_for_everyone()
        return path
