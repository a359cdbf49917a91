"""The configuration of reward training: supervised training's, and how rollouts become updates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Optional

from .. import notation
from ..config import TrainConfig, check_numbers, option

CHOICES = {
    "algorithm": ("grpo", "nft"),
    "rule": ("flow", "dance", "cps", "rf_ancestral"),
    "advantage_scale": ("global", "group"),
    "storage_dtype": ("float32", "bfloat16", "float16"),
}
LOWEST = {
    1: "groups_per_update inner_updates rollout_steps eval_every window_size",
    0: "group_clip kl_beta nft_times nft_old_max eval_rows clip",
}
HIGHEST = {
    1: "nft_old_max",
    10_000: "rollout_steps group_size groups_per_update nft_times",
}
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


@dataclass
class GRPOConfig(TrainConfig):
    """What to reinforce and how. `max_steps` counts updates: each collects rollouts and learns from them."""

    gone: ClassVar[dict[str, str]] = GONE

    algorithm: str = option("grpo", "grpo: clipped policy gradient; nft: DiffusionNFT, no log-probabilities.")

    # rollouts
    rollout_steps: int = option(10, "Sampling steps of a rollout.")
    rollout_guidance: float = option(30.0, "Embedded guidance (cfg for sd_inpaint) of rollouts and updates.")
    rule: str = option("flow", "flow | dance | cps | rf_ancestral: the SDE rule inside the window.")
    eta: Optional[float] = option(None, "Noise of the rule, 0 or more; the rule's own if empty.")  # noqa: UP045
    window: str = option(
        "random",
        "Which steps are random and trained, counted from 0: fixed:FIRST | random:FIRST-LAST, drawn anew at "
        "every update | progressive:FIRST-LAST/EVERY, moving on after so many updates. It stays below LAST; "
        "without numbers in the first half.",
    )
    window_size: int = option(2, "Random steps per rollout.")
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
    data_rows: str = option(
        "0",
        "COUNT[@WEIGHT]: rows of the data per process and update whose supervised loss is added (PPO-ptx, "
        "arXiv 2203.02155), so that learning on some rows does not harm the others; 0 = none.",
    )
    nft_beta: float = option(1.0, "nft: strength of the implicit positive and negative policies.")
    nft_times: int = option(2, "nft: noise levels per rollout and inner update.")
    nft_shared_noise: bool = option(False, "nft: noise all samples of a group alike: less noisy gradients.")
    contrastive_states: str = option(
        "0",
        "COUNT[@WEIGHT], nft: a contrastive update towards the group's best sample: every other sample is "
        "learnt at so many states of its trajectory, away from its own end and towards the best one's image; "
        "0 = none.",
    )
    nft_old_max: float = option(
        0.5,
        "nft: largest decay of the old policy, which makes the rollouts; it grows by 0.001 an update. 0 = "
        "always the present one.",
    )

    # stopping
    eval_rows: int = option(0, "Rows of `sample_data` sampled (plain ODE) at every evaluation; 0 = none.")
    eval_every: int = option(10, "Updates between evaluations.")

    def __post_init__(self) -> None:
        check_numbers(self, LOWEST, HIGHEST)
        super().__post_init__()
        self.windows, self.supervised, self.contrastive  # raise ValueError where written wrongly  # noqa: B018
        self._own_batch()
        if self.method != "lora":
            raise ValueError(f"method is {self.method!r}: reward training trains a LoRA")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        for name in ("group_size", "micro_batch"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}: a group needs two samples or more")
        if self.nft_times < 1 and not self.contrastive.count:
            raise ValueError(f"nft_times is {self.nft_times}: it may be 0 with contrastive_states only")
        if self.contrastive.count and (self.algorithm != "nft" or self.rollout_steps < 2):
            raise ValueError(
                "contrastive_states is for algorithm nft with rollout_steps above 1: set both or leave it out"
            )
        if self.algorithm == "grpo":
            from .windows import window

            window(self.windows.kind, 0, self.rollout_steps, size=self.window_size, **self.window_bounds)
        if self.group_clip and self.algorithm != "nft":
            raise ValueError("group_clip is for algorithm nft: set it to 0, grpo replays whole micro-batches")
        if self.eta is not None and self.eta < 0:
            raise ValueError(f"eta is {self.eta:g}: it must be 0 or more; leave it empty for the rule's own")
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
        return bool(self.supervised.count)

    @property
    def window_bounds(self) -> dict[str, int]:
        """first, last and every of `windows.window`."""
        _, first, last, every = self.windows
        last = last or max(first + self.window_size, self.rollout_steps // 2)
        return {"first": first, "last": last, "every": every, "seed": self.seed}

    @property
    def windows(self) -> notation.Window:
        """What `window` says."""
        return notation.Window.read(self.window)

    @property
    def supervised(self) -> notation.Counted:
        """What `data_rows` says."""
        return notation.Counted.read("data_rows", self.data_rows)

    @property
    def contrastive(self) -> notation.Counted:
        """What `contrastive_states` says."""
        return notation.Counted.read("contrastive_states", self.contrastive_states)
