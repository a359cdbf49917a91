"""The configuration of reward training: supervised training's, and how rollouts become updates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ..config import TrainConfig, check_numbers, option

CHOICES = {
    "algorithm": ("grpo", "nft"),
    "rule": ("flow", "dance", "cps", "rf_ancestral"),
    "window": ("fixed", "random", "progressive"),
    "advantage_scale": ("global", "group"),
    "storage_dtype": ("float32", "bfloat16", "float16"),
}
LOWEST = {
    1: "groups_per_update inner_updates rollout_steps eval_every window_size window_every",
    0: "window_first window_last group_clip kl_beta data_rows data_weight nft_times winner_states "
    "winner_weight nft_old_ramp nft_old_max eval_rows clip",
}
HIGHEST = {
    1: "nft_old_max",
    10_000: "rollout_steps group_size groups_per_update nft_times winner_states",
}
GONE = {
    **TrainConfig.gone,
    **dict.fromkeys(
        ("screen", "screen_rows", "screen_steps"), "learn on more rows: give a larger data source"
    ),
    "data_states": "use winner_states, which needs no wanted pictures, or data_rows for supervised rows",
    "nft_targets": "use data_rows for supervised rows beside the reward",
    "ratio_norm": "leave it out; where too many samples are clipped set a wider clip or inner_updates: 1",
    "advantage_clamp": "leave it out: advantages are clamped to 5; a lower lr bounds the step",
    "patience": "leave it out: a held-out reward that falls 5 times in a row ends the run",
}


@dataclass
class GRPOConfig(TrainConfig):
    """What to reinforce and how. `max_steps` counts updates: each collects rollouts and learns from them."""

    gone: ClassVar[dict[str, str]] = GONE

    algorithm: str = option("grpo", "grpo: clipped policy gradient; nft: DiffusionNFT, no log-probabilities.")

    # rollouts
    rollout_steps: int = option(10, "Sampling steps of a rollout.")
    rollout_guidance: float = option(30.0, "Embedded guidance (cfg for sd_inpaint) of rollouts and updates.")
    rule: str = option("flow", "flow | dance | cps | rf_ancestral: the SDE rule inside the window.")
    eta: float = option(-1.0, "Noise level of the rule; negative = the rule's own default.")
    window: str = option("random", "fixed | random | progressive: which steps are random and trained.")
    window_size: int = option(2, "Random steps per rollout.")
    window_first: int = option(0, "First step that may be in the window.")
    window_last: int = option(0, "End (exclusive) of where the window may be; 0 = half of the steps.")
    window_every: int = option(25, "progressive: updates between moves of the window.")
    group_size: int = option(12, "Samples per row (source and instruction).")
    groups_per_update: int = option(4, "Rows per process and update.")
    micro_batch: int = option(
        12,
        "Samples per forward pass, rolling out and learning: part of a group, or several whole groups.",
    )
    shared_noise: bool = option(False, "Start all samples of a group from one noise.")
    shared_prefix: bool = option(
        False, "Run the steps before the window once per group (implies shared noise)."
    )
    storage_dtype: str = option("float32", "Precision of recorded latents: float32 | bfloat16 | float16.")

    # objective
    rewards: list[str] = option(
        [], "Rewards as NAME or NAME=WEIGHT; also module:function or an http address."
    )
    reward_options: list[str] = option(
        [], "Options of rewards as NAME.KEY=VALUE, for example hpsv2.path=FILE."
    )
    use_targets: bool = option(True, "Rewards may see the target images, where the data has them.")
    inner_updates: int = option(1, "Optimiser steps per rollout collection.")
    clip: float = option(1e-4, "Clip range of the ratio of mean log-probabilities (a tenth of it for cps).")
    advantage_scale: str = option("global", "global | group: whose standard deviation divides.")
    group_clip: float = option(
        0.0,
        "nft: largest gradient norm of one group (see group_norm in rewards.jsonl), so that a few rows do "
        "not outweigh all others; 0 = unlimited.",
    )
    kl_beta: float = option(
        0.0,
        "Weight of the velocity-space divergence from the model before the run: without the adapter, or with "
        "the LoRA of init_lora.",
    )
    data_rows: int = option(
        0,
        "Rows of the data per process and update whose supervised loss is added (PPO-ptx, arXiv 2203.02155), "
        "so that learning on some rows does not harm the others; 0 = none.",
    )
    data_weight: float = option(1.0, "Weight of that loss.")
    nft_beta: float = option(1.0, "nft: strength of the implicit positive and negative policies.")
    nft_times: int = option(2, "nft: noise levels per rollout and inner update.")
    nft_shared_noise: bool = option(False, "nft: noise all samples of a group alike: less noisy gradients.")
    winner_states: int = option(
        0,
        "nft: learn every try that is worse than its group's best at so many states that it came through, "
        "away from its own end and towards the best one's picture, so that sampling does not go wrong there "
        "again; 0 = none.",
    )
    winner_weight: float = option(1.0, "Weight of that loss.")
    nft_old_ramp: float = option(0.001, "nft: growth per update of the old policy's decay.")
    nft_old_max: float = option(0.5, "nft: largest decay of the old policy; 0 = always the present one.")

    # stopping
    eval_rows: int = option(0, "Rows of `sample_data` sampled (plain ODE) at every evaluation; 0 = none.")
    eval_every: int = option(10, "Updates between evaluations.")

    def __post_init__(self) -> None:
        check_numbers(self, LOWEST, HIGHEST)
        super().__post_init__()
        self._own_batch()
        if self.method != "lora":
            raise ValueError(f"method is {self.method!r}: reward training trains a LoRA")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        for name in ("group_size", "micro_batch"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}: a group needs two samples or more")
        if self.nft_times < 1 and not self.winner_states:
            raise ValueError(f"nft_times is {self.nft_times}: it may be 0 with winner_states only")
        if self.winner_states and (self.algorithm != "nft" or self.rollout_steps < 2):
            raise ValueError(
                "winner_states is for algorithm nft with rollout_steps above 1: set both, or winner_states: 0"
            )
        if self.algorithm == "grpo":
            from .windows import window

            window(self.window, 0, self.rollout_steps, size=self.window_size, **self.window_bounds)
        if self.group_clip and self.algorithm != "nft":
            raise ValueError("group_clip is for algorithm nft: set it to 0, grpo replays whole micro-batches")
        if self.data_rows and not self.use_targets:
            raise ValueError(
                "data_rows learns the wanted pictures, but use_targets is false: set one of them"
            )
        if self.shared_prefix and self.task == "sd_inpaint":
            raise ValueError("shared_prefix is for flow models: switch it off for sd_inpaint")

    def _own_batch(self) -> None:
        """The trainer's words for an update's rows. Raises ValueError where a recipe says otherwise."""
        defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
        instead = {
            "batch_size": (self.groups_per_update, "rows of an update are groups_per_update"),
            "accumulation": (1, "more rows before a step are a larger groups_per_update"),
            "prompt_drop": (0.0, "rewards judge what the prompt asks for, so none is dropped"),
        }
        for name, (value, why) in instead.items():
            given = getattr(self, name)
            if given not in (value, defaults[name]):
                raise ValueError(
                    f"{name} is {given:g}, which reward training does not use ({why}): leave it out"
                )
            setattr(self, name, value)

    @property
    def held_out_rows(self) -> int:
        """Rows of `sample_data` that are prepared: those of evaluations, or of sample pictures if more."""
        return max(self.sample_count, self.eval_rows)

    @property
    def needs_targets(self) -> bool:
        """Whether rows without a target image are of no use: only where supervised rows are learnt too."""
        return bool(self.data_rows)

    @property
    def window_bounds(self) -> dict[str, int]:
        """first, last and every of `windows.window`."""
        last = self.window_last or max(self.window_first + self.window_size, self.rollout_steps // 2)
        return {"first": self.window_first, "last": last, "every": self.window_every, "seed": self.seed}

    @property
    def noise_level(self) -> float | None:
        """eta, or None for the rule's own."""
        return None if self.eta < 0 else self.eta
