"""Configurations of trainings that take seconds, on `conftest.py`'s pipelines; two processes for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from comfyui_diptych.training import recipes
from comfyui_diptych.training.reinforce.config import GRPOConfig

TRAIN = {
    "resolution": 32,
    "rank": 4,
    "batch_size": 2,
    "max_steps": 4,
    "optimizer": "adamw",
    "lr": 1e-3,
    "mixed_precision": "no",
    "base_dtype": "float32",
    "cache_dtype": "float32",
    "max_sequence_length": 24,
    "gradient_checkpointing": False,
    "log_with": ["none"],
    "log_every": 1,
    "sample_every": 0,
}
REWARD = {
    **{key: value for key, value in TRAIN.items() if key != "batch_size"},
    "max_steps": 2,
    "rewards": ["toy_judge:brightness"],
    "rollout_steps": 4,
    "rollout_guidance": 3.0,
    "window_size": 2,
    "group_size": 4,
    "micro_batch": 2,
    "groups_per_update": 2,
    "clip": 1e-2,
}
INPAINT = ["shapes:12?size=32&task=inpaint"]


def train_config(folders, output, task="fill", **options):
    """Of supervised training; `folders` holds a pipeline's folder per task."""
    values = {**TRAIN, "data": ["shapes:24?size=32"], "task": task, "model": str(folders / task)}
    return recipes.from_dict({**values, "output_dir": str(output), **options})


def reward_config(folders, output, task="fill", **options):
    """Of reward training, the same."""
    data = INPAINT if task in ("sd_inpaint", "glid") else ["shapes:12?size=32"]
    model = "tiny:glid" if task == "glid" else str(folders / task)  # no pipeline of diffusers is glid's
    values = {**REWARD, "data": data, "task": task, "model": model}
    return recipes.from_dict({**values, "output_dir": str(output), **options}, GRPOConfig)


def write_recipe(c, path: Path) -> Path:
    path.write_text(json.dumps({k: v for k, v in vars(c).items() if v is not None}), encoding="utf-8")
    return path


def two_processes(*arguments, environment=None):
    """`python ARGUMENTS` in two processes over gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    base = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env={**base, **(environment or {})}
    )
    assert done.returncode == 0, done.stderr[-3000:]
