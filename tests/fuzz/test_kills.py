"""kill -9 at random moments of training and of reward training; resumed, the weights are those of a run that
nobody disturbed. Takes minutes: `DIPTYCH_FUZZ=long python -m pytest tests/fuzz/test_kills.py -s`. A kill at a
fixed moment is in tests/parity.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from comfyui_diptych.models import tiny

LONG = os.environ.get("DIPTYCH_FUZZ") == "long"
COMMON = {
    "task": "fill", "model": "tiny:fill", "resolution": 64, "rank": 4, "optimizer": "adamw", "lr": 1e-3,
    "mixed_precision": "no", "base_dtype": "float32", "cache_dtype": "float32", "ema": 0.9, "resume": "auto",
    "gradient_checkpointing": False, "log_with": ["none"], "log_every": 1,
    "max_sequence_length": 64,
}  # fmt: skip
TRAIN = {
    "data": ["shapes:16?size=64"], "batch_size": 2, "max_steps": 14, "save_every": 2, "sample_every": 5,
    "sample_count": 1, "sample_steps": 2,
}  # fmt: skip
GRPO = {
    "data": ["shapes:8?size=64"], "sample_data": ["shapes:2?size=64&split=val"], "rewards": ["shapes"],
    "algorithm": "nft", "rollout_steps": 3, "group_size": 2, "groups_per_update": 2, "micro_batch": 4,
    "max_steps": 7, "save_every": 1, "sample_every": 0, "eval_rows": 2, "eval_every": 2,
}  # fmt: skip
RUNS = {"train": TRAIN, "grpo": GRPO}

# Forks of one process, since it takes longer to start than to run. Prints where every kill fell.
SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from comfyui_diptych.training import config, recipes
from comfyui_diptych.training import trainer as sft
from comfyui_diptych.training.reinforce import trainer as grpo
from comfyui_diptych.training.runtime import checkpoint
from comfyui_diptych.training.reinforce.config import GRPOConfig

name, root, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
values = json.load(open(sys.argv[4]))
rng = random.Random(int(sys.argv[5]))

def start(folder):
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        kinds = {"grpo": (GRPOConfig, grpo.GRPOTrainer), "train": (config.TrainConfig, sft.Trainer)}
        kind, trainer = kinds[name]
        c = recipes.from_dict({**values, "output_dir": str(folder), "output_name": "lora"}, kind)
        trainer(c).run()
        os._exit(0)
    return child

def finish(child):
    assert os.waitpid(child, 0)[1] == 0

def weights(folder):
    last = checkpoint.folders(folder / "checkpoints")[-1]
    return [load_file(p) for p in (folder / "lora.safetensors", *sorted(last.glob("*.safetensors")))]

def same(folder):
    for one, two in zip(weights(root / "straight"), weights(folder), strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), folder

def lines(folder):
    log = folder / "metrics.jsonl"
    return len(log.read_bytes().splitlines()) if log.is_file() else 0

def ended(child):
    return os.waitpid(child, os.WNOHANG)[0]

child = start(root / "straight")
while not lines(root / "straight"):
    time.sleep(0.002)
began = time.monotonic()
finish(child)
step = (time.monotonic() - began) / (values["max_steps"] - 1)
number, done = 0, 0
while done < kills:
    folder, number = root / f"broken_{number}", number + 1
    for _ in range(3):  # more than one kill on the way to one result
        child, more = start(folder), lines(folder) + rng.randint(0, 4)  # steps until it is hit
        while lines(folder) < more and not ended(child):
            time.sleep(0.002)
        until = time.monotonic() + rng.uniform(0, step)
        try:
            while time.monotonic() < until and not ended(child):
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            break  # it was at its end
        done += 1
        steps = sorted(p.name for p in (folder / "checkpoints").glob("*"))
        print(f"{name}: kill {done} in {folder.name} after {lines(folder)} lines, {steps}", flush=True)
    finish(start(folder))
    same(folder)
    print(f"{name}: {folder.name} is bit-equal", flush=True)
"""


@pytest.mark.skipif(not LONG, reason="minutes long: set DIPTYCH_FUZZ=long")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", RUNS)
def test_runs_killed_at_random_end_with_the_same_weights(name, tmp_path):
    assert tiny.folder().is_dir()
    values = {**COMMON, **RUNS[name], "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "values.json").write_text(json.dumps(values))
    command = [sys.executable, "-c", SCRIPT, name, str(tmp_path), "5", str(tmp_path / "values.json"), "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
