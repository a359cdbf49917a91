"""The configuration of reward training: supervised training's, and how rollouts become updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Optional

from .. import notation
from ..config import DTYPES, FLUX, TrainConfig
from ..runtime.options import group
from ..tiny.options import TinyOptions
from .windows import Window

MOST = 10_000  # steps, samples or rows
GONE = {
    **TrainConfig.gone,
    **dict.fromkeys(
        ("screen", "screen_rows", "screen_steps"), "learn on more rows: give a larger data source"
    ),
    "data_states": "use contrastive_states, which needs no target images, or data_rows for supervised rows",
    "winner_states": "write contrastive_states: COUNT or COUNT@WEIGHT",
    "winner_weight": "write contrastive_states: COUNT@WEIGHT",
    "data_weight": "write data_rows: COUNT@WEIGHT",
    "nft_old_ramp": "leave it out: the decay grows by 0.001 an update, up to nft_old_max",
    "use_targets": "leave it out: rewards see the target images where the data has them",
    "window_first": "write window: random:FIRST-LAST, or fixed:FIRST",
    "window_last": "write window: random:FIRST-LAST",
    "window_every": "write window: progressive:FIRST-LAST/EVERY",
    "nft_targets": "use data_rows for supervised rows beside the reward",
    "ratio_norm": "leave it out; where too many samples are clipped set a wider clip or inner_updates: 1",
    "advantage_clamp": "leave it out: advantages are clamped to 5; a lower lr bounds the step",
    "patience": "leave it out: a held-out reward that falls 5 times in a row ends the run",
}

_rewards = group("Rewards")
_rollouts = group("Rollouts")
_objective = group("Objective")
_grpo = group("GRPO: a clipped policy gradient on replayed steps")
_nft = group("DiffusionNFT: no log-probabilities")
_held_out = group("Held-out rows")


@dataclass
class GRPOConfig(TrainConfig):
    """What to reinforce and how. `max_steps` counts updates: each collects rollouts and learns from them."""

    gone: ClassVar[dict[str, str]] = GONE
    essentials: ClassVar[tuple[str, ...]] = ("rewards", "task", "model", "data", "output_dir")
    unused: ClassVar[tuple[str, ...]] = (
        *("method", "moe_experts", "moe_top_k", "moe_gate", "moe_balance"),
        *("batch_size", "accumulation", "prompt_drop"),
    )

    rewards: list[str] = _rewards(
        [], "What is good, as NAME or NAME=WEIGHT; also module:function or an http address (docs/grpo.md)."
    )
    reward_options: list[str] = _rewards(
        [], "Options of rewards as NAME.KEY=VALUE, for example hpsv2.path=FILE."
    )

    rollout_steps: int = _rollouts(10, "Sampling steps of a rollout.", low=1, high=MOST)
    rollout_guidance: float = _rollouts(
        30.0, "Embedded guidance (cfg for sd_inpaint and glid) of rollouts and updates."
    )
    group_size: int = _rollouts(12, "Samples per row (source and instruction), 2 or more.", high=MOST)
    groups_per_update: int = _rollouts(4, "Rows per process and update.", low=1, high=MOST)
    micro_batch: int = _rollouts(
        12, "Samples per forward pass, rolling out and learning: part of a group, or several whole groups."
    )
    shared_noise: bool = _rollouts(False, "Start all samples of a group from one noise, as DanceGRPO does.")

    algorithm: str = _objective(
        "grpo", "How samples become an update: one of the two below.", choices=("grpo", "nft")
    )
    advantage_scale: str = _objective(
        "global",
        "Whose standard deviation divides: of all scores of an update, or of the group's.",
        choices=("global", "group"),
    )
    inner_updates: int = _objective(1, "Optimiser steps per collection of rollouts.", low=1)
    kl_beta: float = _objective(
        0.0,
        "Weight of the velocity-space divergence from the reference model, the one before the run: without "
        "the adapter, or with the LoRA of init_lora.",
        low=0,
    )
    data_rows: str = _objective(
        "0",
        "COUNT[@WEIGHT]: rows of the data per process and update whose supervised loss is added (PPO-ptx, "
        "arXiv 2203.02155), so that learning on some rows does not harm the others; 0 = none.",
    )

    rule: str = _grpo(
        "flow", "The SDE rule of the random steps.", choices=("flow", "dance", "cps", "rf_ancestral")
    )
    eta: Optional[float] = _grpo(None, "Noise of the rule, 0 or more; the rule's own if empty.")  # noqa: UP045
    window: str = _grpo(
        "random",
        "Which steps are random and trained, counted from 0: fixed:FIRST | random:FIRST-LAST, drawn anew at "
        "every update | progressive:FIRST-LAST/EVERY, moving on after so many updates. It stays below LAST; "
        "without numbers in the first half.",
    )
    window_size: int = _grpo(2, "Random steps per rollout.", low=1)
    clip: float = _grpo(
        1e-4, "Clip range of the ratio of mean log-probabilities (a tenth of it for cps).", low=0
    )
    shared_prefix: bool = _grpo(
        False, "Run the steps before the window once per group, which saves them (implies shared noise)."
    )
    storage_dtype: str = _grpo(
        "float32",
        "Precision of recorded latents; in 16 bits, for long windows at large sizes, the ratio of unchanged "
        "weights is no longer exactly 1.",
        choices=DTYPES,
    )

    nft_beta: float = _nft(1.0, "Strength of the implicit positive and negative policies.")
    nft_times: int = _nft(2, "Noise levels per rollout and inner update.", low=0, high=MOST)
    nft_shared_noise: bool = _nft(
        False, "Noise all samples of a group alike: what they share cancels, the gradient is less noisy."
    )
    nft_old_max: float = _nft(
        0.5,
        "Largest decay of the old policy, which makes the rollouts; it grows by 0.001 an update. 0 = always "
        "the present one.",
        low=0,
        high=1,
    )
    group_clip: float = _nft(
        0.0,
        "Largest gradient norm of one group (see group_norm in rewards.jsonl), so that a few rows do not "
        "outweigh all others; 0 = unlimited.",
        low=0,
    )
    contrastive_states: str = _nft(
        "0",
        "COUNT[@WEIGHT]: a contrastive update towards the group's best sample: every other sample is learnt "
        "at so many states of its trajectory, away from its own end and towards the best one's image; 0 = "
        "none.",
    )

    eval_rows: int = _held_out(
        0,
        "Rows of `sample_data` sampled (plain ODE) at every evaluation; the best weights are kept, and a "
        "reward that falls 5 times in a row ends the run. 0 = none.",
        low=0,
    )
    eval_every: int = _held_out(10, "Updates between evaluations.", low=1)

    def __post_init__(self) -> None:
        """As of `TrainConfig`, and the options of reward training."""
        super().__post_init__()
        self._own_batch()
        self._check_groups()
        self._check_algorithm()

    def check_notations(self) -> None:
        """As of `TrainConfig`."""
        super().check_notations()
        for read in (lambda: self.windows, lambda: self.supervised, lambda: self.contrastive):
            read()

    def _check_groups(self) -> None:
        if self.task == "multimodal":
            raise ValueError("task multimodal has no reward training: use diptych train")
        if self.method != "lora":
            raise ValueError(f"method is {self.method!r}: reward training trains a LoRA")
        for name in ("group_size", "micro_batch"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}: a group needs two samples or more")
        if self.shared_prefix and self.task not in FLUX:
            raise ValueError(f"shared_prefix is for flow models: switch it off for {self.task}")

    def _check_algorithm(self) -> None:
        if self.eta is not None and self.eta < 0:
            raise ValueError(f"eta is {self.eta:g}: it must be 0 or more; leave it empty for the rule's own")
        if self.algorithm == "grpo":
            self.windows.check()
        if self.group_clip and self.algorithm != "nft":
            raise ValueError("group_clip is for algorithm nft: set it to 0, grpo replays whole micro-batches")
        if self.nft_times < 1 and not self.contrastive.count:
            raise ValueError(f"nft_times is {self.nft_times}: it may be 0 with contrastive_states only")
        if self.contrastive.count and (self.algorithm != "nft" or self.rollout_steps < 2):
            raise ValueError(
                "contrastive_states is for algorithm nft with rollout_steps above 1: set both or leave it out"
            )

    def _own_batch(self) -> None:
        """The trainer's words for an update's rows. Raises ValueError where a recipe says otherwise."""
        instead = {
            "batch_size": (self.groups_per_update, "rows of an update are groups_per_update"),
            "accumulation": (1, "more rows before a step are a larger groups_per_update"),
            "prompt_drop": (0.0, "rewards judge what the prompt asks for, so none is dropped"),
        }
        for name, (value, why) in instead.items():
            given = getattr(self, name)
            if given not in (value, getattr(TrainConfig, name)):
                raise ValueError(
                    f"{name} is {given:g}, which reward training does not use ({why}): leave it out"
                )
            setattr(self, name, value)

    @property
    def held_out_rows(self) -> int:
        """Rows of `sample_data` that are prepared: those of evaluations, or of sample images if more."""
        return max(self.sample_count, self.eval_rows)

    @property
    def needs_targets(self) -> bool:
        """Whether rows without a target image are of no use: only where supervised rows are learnt too."""
        return bool(self.supervised.count)

    @property
    def windows(self) -> Window:
        """What `window`, `window_size` and `rollout_steps` say."""
        return Window.read(self.window, self.window_size, self.rollout_steps, self.seed)

    @property
    def supervised(self) -> notation.Counted:
        """What `data_rows` says."""
        return notation.Counted.read("data_rows", self.data_rows)

    @property
    def contrastive(self) -> notation.Counted:
        """What `contrastive_states` says."""
        return notation.Counted.read("contrastive_states", self.contrastive_states)


@dataclass
class TinyGRPOConfig(TinyOptions, GRPOConfig):
    """Reward training with the options that only the tiny models have."""


GRPOConfig.tiny = TinyGRPOConfig
GRPOConfig.families = {}
