"""The configuration of reward training: supervised training's, and how rollouts become updates."""

from __future__ import annotations

from dataclasses import dataclass

from .config import TrainConfig, option

CHOICES = {
    "algorithm": ("grpo", "nft"),
    "rule": ("flow", "dance", "cps", "rf_ancestral"),
    "window": ("fixed", "random", "progressive"),
    "advantage_scale": ("global", "group"),
    "storage_dtype": ("float32", "bfloat16", "float16"),
}


@dataclass
class GRPOConfig(TrainConfig):
    """What to reinforce and how. `max_steps` counts updates: each collects rollouts and learns from them."""

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
    screen: float = option(
        1.0,
        "Learn on this share of the rows at most, those that came out worst in one trial each (and none that "
        "came out as well as the best); 1 = on all.",
    )
    screen_rows: int = option(1000, "Rows tried in a round of screening.")
    screen_steps: int = option(0, "Sampling steps of such a trial; 0 = rollout_steps.")
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
    use_targets: bool = option(True, "Rewards may see the finished images, where the data has them.")
    inner_updates: int = option(1, "Optimiser steps per rollout collection.")
    clip: float = option(1e-4, "Clip range of the ratio of mean log-probabilities (a tenth of it for cps).")
    advantage_clamp: float = option(5.0, "Largest advantage.")
    advantage_scale: str = option("global", "global | group: whose standard deviation divides.")
    ratio_norm: bool = option(False, "GRPO-Guard's correction of the ratio's mean and scale.")
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
    data_states: int = option(
        0,
        "Learn those rows at so many states each of the model's own sampling in sample_steps steps, aimed at "
        "the wanted picture (DAgger, arXiv 1011.0686), so that it comes back from where it drifts to; "
        "0 = at the wanted picture noised.",
    )
    nft_beta: float = option(1.0, "nft: strength of the implicit positive and negative policies.")
    nft_times: int = option(2, "nft: noise levels per rollout and inner update.")
    nft_shared_noise: bool = option(False, "nft: noise all samples of a group alike: less noisy gradients.")
    nft_targets: bool = option(
        False,
        "nft: the wanted picture takes the place of each group's last sample and is judged like it "
        "(LUFFY, arXiv 2504.14945), so that rows which always fail teach too.",
    )
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
    patience: int = option(
        5, "Evaluations in a row with a falling reward that end the run; the best is kept."
    )

    def __post_init__(self) -> None:
        self.batch_size, self.accumulation, self.prompt_drop = self.groups_per_update, 1, 0.0
        if self.eval_rows:
            self.sample_count = self.eval_rows
        super().__post_init__()
        if self.method != "lora":
            raise ValueError(f"method is {self.method!r}: reward training trains a LoRA")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        for name in ("group_size", "micro_batch"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}: a group needs two samples or more")
        for name in (
            "groups_per_update",
            "inner_updates",
            "rollout_steps",
            "eval_every",
            "screen_rows",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 1 or more")
        if self.nft_times < 1 and not self.winner_states:
            raise ValueError(f"nft_times is {self.nft_times}: it may be 0 with winner_states only")
        if self.winner_states and (self.algorithm != "nft" or self.nft_targets or self.rollout_steps < 2):
            raise ValueError(
                "winner_states is for algorithm nft with rollout_steps above 1 and without nft_targets: "
                "the best try takes the place of the wanted picture"
            )
        if not 0 < self.screen <= 1:
            raise ValueError(f"screen is {self.screen:g}: it is a share above 0, at most 1")
        if self.algorithm == "grpo":
            from .windows import window

            window(self.window, 0, self.rollout_steps, size=self.window_size, **self.window_bounds)
        if self.group_clip and self.algorithm != "nft":
            raise ValueError("group_clip is for algorithm nft: set it to 0, grpo replays whole micro-batches")
        if self.nft_targets and self.algorithm != "nft":
            raise ValueError("nft_targets is for algorithm nft: a wanted picture has no recorded steps")
        for name in ("nft_targets", "data_rows"):
            if getattr(self, name) and not self.use_targets:
                raise ValueError(
                    f"{name} learns the wanted pictures, but use_targets is false: set one of them"
                )
        if self.data_states and not (self.data_rows and self.sample_steps > 1):
            raise ValueError("data_states needs data_rows above 0 and sample_steps above 1: set both")
        if self.shared_prefix and self.task == "sd_inpaint":
            raise ValueError("shared_prefix is for flow models: switch it off for sd_inpaint")

    @property
    def needs_targets(self) -> bool:
        """Whether rows without a finished image are of no use: only where supervised rows are learnt too."""
        return bool(self.nft_targets or self.data_rows)

    @property
    def window_bounds(self) -> dict[str, int]:
        """first, last and every of `windows.window`."""
        last = self.window_last or max(self.window_first + self.window_size, self.rollout_steps // 2)
        return {"first": self.window_first, "last": last, "every": self.window_every, "seed": self.seed}

    @property
    def noise_level(self) -> float | None:
        """eta, or None for the rule's own."""
        return None if self.eta < 0 else self.eta
