"""Reward training from top to bottom: roll out, score, compare, update, evaluate, save.

It stands on the supervised trainer: data, caches, adapters, checkpoints, processes and export are
`Trainer`'s. One step in reading order: `rollout.py` samples groups, `scoring.py` asks the rewards,
`advantage.py` compares, `objectives.py` says what is minimised, `gradients.py` takes its gradient,
`held_out.py` keeps the best weights.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Batches, latents_like
from ..evaluate import history
from ..rewards import from_recipe
from ..runtime import checkpoint, optim
from ..runtime.attention import for_learning
from ..runtime.checkpoint import TrainingError
from ..runtime.random_streams import row_uniform
from ..tasks.base import DTYPES
from ..tasks.sampling import RolloutSettings
from ..trainer import Trainer
from . import before_after, held_out
from .advantage import advantages
from .config import GRPOConfig
from .gradients import Gradients, Log
from .objectives import make_objective
from .rollout import Rollout, collect, with_advantages
from .scoring import RowScorer, judged
from .weights import ReferenceModel, holding

logger = logging.getLogger(__name__)

UNJUDGED = 3  # updates in a row of which no image could be judged that end the run
DATA = 1 << 42  # stretch of the random stream for supervised rows


class GRPOTrainer(Trainer):
    """One reward-training run; callbacks are `Trainer`'s. A step is one collection and its updates.

    `prepare()` sets, beside what `Trainer` has, `rewards`, `held_out`, `reference`, `objective` and
    `gradients`. measures: what was logged of the last step, by name.
    """

    config: GRPOConfig

    def __init__(self, config: GRPOConfig, **callbacks: Any):
        super().__init__(config, **callbacks)
        self.measures: dict[str, float] = {}
        self.scorers: dict[int, RowScorer] = {}
        self.unjudged, self.any_judged = 0, False

    # ---------------------------------------------------------------- preparation

    def check(self) -> None:
        """Refuse sharded weights, and load the rewards: before data are cached or a model is loaded."""
        if self.processes.sharded:
            kind = self.accelerator.distributed_type.value
            raise ValueError(
                f"reward training under {kind} is not possible, since processes make different numbers of "
                "backward passes: launch it without (DDP), where the base does not fit with base_dtype: "
                "float8_e4m3fn"
            )
        self.rewards = from_recipe(self.config.rewards, self.config.reward_options).composite
        self.held_out = held_out.HeldOut(self.rewards, self.config.eval_rows)

    def prepare(self) -> None:
        """As `Trainer.prepare`; then the noise levels that are trained and the order of supervised rows."""
        super().prepare()
        c, batches = self.config, self.data.batches
        self.task.lora_window = self.objective.lora_window(self._latent_sizes())  # of all samples from now on
        if c.supervised.count:
            order = batches.sampler(
                c.supervised.count, c.seed + 1, self.processes.rank, self.processes.world, prior=False
            )
            self.data_order = iter(order.start_at(self.step))

    def _prepare_model(self) -> None:
        c, data = self.config, self.data
        if c.needs_targets and not data.batches.targets:
            raise ValueError(
                "data_rows learns target images, but rows of the data have none: set data_rows: 0"
            )
        for batches in (data.batches, data.sample_batches) if c.eval_rows else (data.batches,):
            self.scorer(batches).check()
        super()._prepare_model()
        for part in self.model.parts.values():
            part.eval()  # rollout and replay must be the same function, so no dropout in either
        self._make_objective()

    def _make_objective(self) -> None:
        c, task, model = self.config, self.task, self.model
        part = task.denoiser_part
        self.reference = ReferenceModel(task, model.parts[part], model.parameters, c)
        self.objective = make_objective(task, c, self.reference, model.parameters)
        parameters = list(model.parameters.values())
        self.gradients = Gradients(self.objective, self.processes, model.prepared[part], parameters, c)

    def scorer(self, batches: Batches) -> RowScorer:
        """What scores images of these rows, and remembers the rows it has read."""
        return self.scorers.setdefault(id(batches), RowScorer(self.rewards, batches))

    def sampling_batch(
        self, batches: Batches, numbers: Sequence[int], guidance: float | None = None
    ) -> dict[str, Any]:
        """What sampling needs of these rows, on the device. guidance: None is that of rollouts."""
        batch = self._to_device(batches(list(numbers), [False] * len(numbers)))
        guidance = self.config.rollout_guidance if guidance is None else guidance
        return self.task.guided(batch, batches.text, guidance)

    def _latent_sizes(self) -> Iterator[tuple[int, int]]:
        """(height, width) in cells of the latents of every image size in the data."""
        batches = self.data.batches
        for number in {entry.size: number for number, entry in enumerate(batches.entries)}.values():
            height, width = latents_like(batches([number], [False])).shape[-2:]
            yield height, width

    # ---------------------------------------------------------------- one step

    def train_step(self) -> tuple[Tensor, float]:
        """Roll out, score, compare, learn; now and then evaluate.

        Returns (mean loss of this process, gradient norm of the last update).
        """
        c, at, processes = self.config, self.position, self.processes
        optim.set_lr(self.model.optimizer, at.step, c)
        rows = next(self.order)
        data = next(self.data_order) if c.supervised.count else []
        at.micro += 1
        first = (at.step * processes.world + processes.rank) * len(rows)
        groups = range(first, first + len(rows))
        rollouts = self.roll_out(rows, groups)
        scores = self._scores(rollouts, rows)
        rollouts, kept = self._compared(rollouts, scores, groups)
        loss, norm = torch.zeros((), device=processes.device), 0.0
        size = -(-len(rollouts) // c.inner_updates)
        parts = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        for part in parts:
            partial, norm = self.update(part, kept, data, len(parts))
            loss += partial / len(parts)
        at.step += 1
        if self.model.average is not None:
            self.model.average.update(self.model.parameters)
        self.objective.updated(at.step)
        if c.eval_rows and at.step % c.eval_every == 0:
            self.evaluate()
        return loss, norm

    def roll_out(self, rows: Sequence[int], groups: Sequence[int]) -> list[Rollout]:
        """A group of samples of each row; groups: their numbers, see `rollout.collect`."""
        c = self.config
        settings = RolloutSettings(
            c.rollout_steps,
            c.rollout_guidance,
            c.rule,
            c.eta,
            self.objective.window(self.step),
            DTYPES[c.storage_dtype],
        )
        with self.objective.sampling_weights():
            return collect(
                self.task,
                lambda numbers: self.sampling_batch(self.data.batches, numbers),
                rows,
                groups,
                c,
                settings,
            )

    def _scores(self, rollouts: Sequence[Rollout], rows: Sequence[int]) -> dict[str, Tensor]:
        """Raw scores [N] by reward of the samples of all processes, in order of their rank."""
        numbers = [row for row in rows for _ in range(self.config.group_size)]
        images = torch.cat([self.task.host.decode(r.latents).float().cpu() for r in rollouts])
        raw = self.scorer(self.data.batches).score(images, numbers)
        table = torch.stack(list(raw.values()), dim=1)  # float32, and groups integers: MPS knows no float64
        everyone = self.accelerator.gather(table.to(self.processes.device)).cpu()
        scores = dict(zip(raw, everyone.unbind(1), strict=True))
        self.measures = {f"reward/{name}": mean for name, mean in judged(scores).items()}
        self.measures |= {f"failed/{n}": int(v.isnan().sum()) for n, v in scores.items() if v.isnan().any()}
        self._refuse_unjudged(everyone)
        return scores

    def _refuse_unjudged(self, scores: Tensor) -> None:
        """scores [N,R] of all processes. Raise TrainingError where none judges any more, or ever did."""
        if not scores.isnan().all():
            self.unjudged, self.any_judged = 0, True
            return
        self.unjudged += 1
        logger.warning("no reward could judge any of the %d images of update %d", len(scores), self.step + 1)
        if self.unjudged >= UNJUDGED or (self.step + 1 == self.config.max_steps and not self.any_judged):
            raise TrainingError(
                f"no reward could judge an image of the last {self.unjudged} updates, so nothing is learnt: "
                f"see the warnings above for {', '.join(self.rewards.weights)}; "
                f"{checkpoint.last_good(self.checkpoints)}"
            )

    def _compared(
        self, rollouts: list[Rollout], scores: dict[str, Tensor], groups: Sequence[int]
    ) -> tuple[list[Rollout], int]:
        """The rollouts with advantages, from the scores of all processes, and how many samples count."""
        c, rank = self.config, self.processes.rank
        own = torch.tensor([group for group in groups for _ in range(c.group_size)])
        everyone = self.accelerator.gather(own.to(self.processes.device)).cpu()
        found = advantages(scores, everyone, self.rewards.weights, scale=c.advantage_scale)
        kept = int(found.keep.sum())
        self.measures["kept"] = kept / len(everyone)
        mine = slice(rank * len(own), (rank + 1) * len(own))
        rollouts = with_advantages(rollouts, found.values[mine], found.keep[mine])
        return self.objective.prepared(rollouts), kept

    def update(
        self, rollouts: Sequence[Rollout], kept: int, data: Sequence[int] = (), updates: int = 1
    ) -> tuple[Tensor, float]:
        """One of `updates` optimiser steps: on these micro-batches and, supervised, on the rows `data`.

        kept: samples of all processes that teach something; if none does, nothing is computed. Returns (this
        process's share of the loss, gradient norm). Raises Diverged.
        """
        if kept == 0 and not data:
            return torch.zeros((), device=self.processes.device), 0.0
        supervised = self._supervised(data) if data else {}
        total, log = self.gradients.add(rollouts, kept, updates)
        norm = self._clip(total)
        self.position.updating = True
        self.model.optimizer.step()
        self.model.optimizer.zero_grad()
        joined = {name: torch.cat(values).float() for name, values in (log | supervised).items()}
        self.measures |= {name: float(values.mean()) for name, values in joined.items() if len(values)}
        return total, norm

    def _supervised(self, rows: Sequence[int]) -> Log:
        """Take this process's gradient of the supervised loss on these rows (PPO-ptx, arXiv 2203.02155); the
        reward's is added to it. Returns what to log.
        """
        c, processes = self.config, self.processes
        module, log = self.model.prepared[self.task.denoiser_part], []
        first = (self.step * processes.world + processes.rank) * len(rows)
        for start in range(0, len(rows), c.micro_batch):
            some = list(rows[start : start + c.micro_batch])
            places = [first + start + index for index in range(len(some))]
            batch, noise = self._with_noise(some, [False] * len(some), [DATA + place for place in places])
            with self.accelerator.no_sync(module), for_learning(noise):
                loss = self.task.row_losses(batch, noise, row_uniform(c.seed, places, "data"))
                self.accelerator.backward(c.supervised.weight / len(rows) * loss.sum())
            log.append(loss.detach())
        return {"data": log}

    # ---------------------------------------------------------------- evaluation

    def evaluate(self) -> None:
        """Score held-out rows, and keep the weights if they are the best so far."""
        processes, model = self.processes, self.model
        count = min(self.config.eval_rows, len(self.data.sample_batches.entries))
        with model.averaged():
            own = self.held_out_scores(range(count)[processes.rank :: processes.world])
        raw = {name: held_out.gathered(self.processes, values) for name, values in own.items()}
        weights = model.average.values if model.average is not None else model.parameters
        means = self.held_out.record(self.step, raw, weights)
        self.measures |= {f"held_out/{name}": mean for name, mean in means.items()}

    def held_out_scores(
        self, numbers: Sequence[int], settings: RolloutSettings | None = None
    ) -> dict[str, Tensor]:
        """Raw scores [N] by reward of one ODE image of each of these rows of `sample_data`.

        settings: by default those of rollouts, with the LoRA where loaders will have it on.
        """
        c, batches = self.config, self.data.sample_batches
        plain = RolloutSettings(c.rollout_steps, c.rollout_guidance, lora_window=self.task.lora_window)
        return held_out.sampled_scores(
            self.task,
            self.scorer(batches),
            lambda some: self.sampling_batch(batches, some),
            numbers,
            settings or plain,
            micro_batch=c.micro_batch,
            seed=c.seed,
        )

    def _steps(self) -> bool:
        if self.config.eval_rows and not self.held_out.history:
            self.evaluate()  # what there is to beat, and what is exported if nothing beats it
        return super()._steps()

    def _settled(self) -> bool:
        if not self.config.eval_rows or not self.held_out.collapsed:
            return False
        if self.processes.main:
            logger.warning("ended: the held-out reward fell %d times in a row", held_out.PATIENCE)
        return True

    def _report(self, loss: float, norm: float, pace: float) -> None:
        super()._report(loss, norm, pace)
        if self.processes.main:
            self.accelerator.log(self.measures, step=self.step)
            with open(self.output / "rewards.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **self.measures}) + "\n")

    # ---------------------------------------------------------------- checkpoints and results

    def extra_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The best weights so far, and what the objective keeps."""
        best = {} if self.held_out.best is None else {"best": self.held_out.best}
        return {f"{name}.safetensors": values for name, values in (best | self.objective.tensors()).items()}

    def extra_state(self) -> dict[str, Any]:
        """The evaluations so far."""
        held = self.held_out
        return {"history": held.history, "best_scores": held.best_scores, "any_judged": self.any_judged}

    def load_extra(self, found: checkpoint.Found, state: dict[str, Any]) -> None:
        """Go on with the evaluations and weights of a checkpoint."""
        held, objective = self.held_out, self.objective
        held.history, held.best_scores = state["history"], state["best_scores"]
        self.any_judged = state["any_judged"]
        for name in ("best", *objective.tensors()):
            file = f"{name}.safetensors"
            if not found.has(file):
                if file in found.lacking:
                    logger.warning("%s: the %s weights begin anew at the present ones", found.folder, name)
                continue
            tensors = checkpoint.read_tensors(found.folder, file)
            tensors = {key: value.to(self.processes.device) for key, value in tensors.items()}
            if name == "best":
                held.best = tensors
            else:
                objective.load(name, tensors)

    def header(self) -> dict[str, Any]:
        """As of `Trainer`, with rewards, reward curve and the noise levels that were trained."""
        c, window = self.config, self.task.lora_window
        out = super().header() | {
            "algorithm": c.algorithm,
            "reward": ", ".join(f"{name} x {weight:g}" for name, weight in self.rewards.weights.items()),
            "curve": self._curve(),
        }
        return out if window is None else out | {"sigma_window": list(window), "rule": c.rule}

    def _curve(self) -> list[list[float]]:
        """[[step, reward], ...] of the held-out rows; without such rows, of the rollouts (200 at most)."""
        points = self.held_out.curve
        if not points:
            points = list(history.rewards(self.output).items())
            points = points[:: max(1, -(-len(points) // 200))]
        return [[step, round(value, 5)] for step, value in points if math.isfinite(value)]

    def final_weights(self) -> AbstractContextManager:
        """The best weights by the held-out reward where there was one, else the last (averaged)."""
        best = self.held_out.best
        return super().final_weights() if best is None else holding(self.model.parameters, best)

    def before_after(self, many: bool = False) -> Tensor:
        """IMAGE [1,H,W,3] of what the finished run changed; see `before_after.sheet`.

        Rows are held-out ones where there are any; the weights are those of the exported file. many: choose
        what is shown from more rows, for models whose samples cost nothing.
        """
        c, data = self.config, self.data
        batches = data.sample_batches if c.sample_data else data.batches
        module = self.model.parts[self.task.denoiser_part]
        with self.final_weights():
            self.task.make_host(module)
            return before_after.sheet(
                self.task,
                self.scorer(batches),
                lambda numbers: self.sampling_batch(batches, numbers, c.sample_guidance),
                self.reference,
                seed=c.seed,
                rows=before_after.MANY if many else before_after.SHOWN,
            )
