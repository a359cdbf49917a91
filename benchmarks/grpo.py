"""Claim: the `fast` preset reaches the reward that the `dance` preset ends with in at most 1/3 of its time.

Named peer: DanceGRPO's settings (16 steps, 9 of them trained, a group's noise shared) as `grpo_dance` has
them, on the same tiny model, data, reward, adapter and learning rate. Both start from the bundled editor at
reduced strength: at full strength dance gains nothing that could be reached. Each preset runs in a process of
its own, one after the other; the clock runs during updates only, not while the held-out rows are sampled,
which both do alike (plain ODE, 12 steps, the same noise). Prints samples and updates per second and peak
memory.

    python benchmarks/grpo.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 1 / 3
LEAST = 0.01  # gain of dance, below which reaching it says nothing
SMOOTH = 3  # evaluations averaged before they are compared


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="fill", choices=("fill", "kontext", "sd_inpaint"))
    parser.add_argument(
        "--start", default="auto", help="LoRA merged first, PATH:STRENGTH; auto = the bundled editor, none"
    )
    parser.add_argument("--strength", type=float, default=0.6, help="of the bundled editor: leaves headroom")
    parser.add_argument("--updates", type=int, default=60, help="updates of dance")
    parser.add_argument("--most", type=int, default=4, help="fast gives up after this many times the updates")
    parser.add_argument("--every", type=int, default=5, help="updates between evaluations")
    parser.add_argument("--rows", type=int, default=96, help="held-out rows of an evaluation")
    parser.add_argument("--data", type=int, default=1000, help="rows to learn on")
    parser.add_argument("--groups", type=int, default=0, help="rows per update; 0 = the preset's")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child: run this preset
    parser.add_argument("--target", type=float, default=float("inf"), help=argparse.SUPPRESS)
    return parser.parse_args()


def start_lora(options: argparse.Namespace) -> str:
    from comfyui_diptych.models import tiny

    if options.start != "auto":
        return "" if options.start == "none" else options.start
    names = tiny.card().get("default_loras", {}).get(options.task, [])
    return f"{tiny.folder() / 'loras' / names[0]}:{options.strength:g}" if names else ""


def trainer_of(options: argparse.Namespace, folder: Path):
    from comfyui_diptych.models import tiny
    from comfyui_diptych.training.choices import RewardChoices, configure
    from comfyui_diptych.training.reinforce.trainer import GRPOTrainer

    kind = "&task=inpaint" if options.task == "sd_inpaint" else ""
    choices = RewardChoices(
        data=f"shapes:{options.data}?split=train&seed=0&size=64{kind}",
        model=str(tiny.folder() / options.task),
        name="benchmark",
        preset=options.one,
        rewards=("shapes=1",),
        steps=10**6,
        lr=options.lr,
        groups=options.groups,
        start=start_lora(options),
        preview_every=0,
    )
    config = configure(choices, folder)
    config.sample_data = [f"shapes:{options.rows}?split=test&seed=1&size=64{kind}"]
    config.sample_count = options.rows
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    trainer = GRPOTrainer(config)
    trainer.prepare()
    return trainer


def held_out(trainer) -> float:
    """Mean reward of the held-out rows: 12 ODE steps from fixed noise, as the weights are, not averaged."""
    from comfyui_diptych.training.tasks.sampling import RolloutSettings

    rows = range(len(trainer.data.sample_batches.entries))
    scores = trainer.held_out_scores(rows, RolloutSettings(12, trainer.config.rollout_guidance))
    return float(scores["shapes"].nanmean())


def peak_memory() -> float:
    """MB: of the GPU if there is one, else of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def one(options: argparse.Namespace) -> None:
    """A child: train one preset, a JSON line per evaluation on stdout."""
    results, sys.stdout = sys.stdout, sys.stderr
    most = options.updates * (options.most if options.target < float("inf") else 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(options, Path(folder))
        clock = processor = 0.0
        for update in range(most + 1):
            if update:
                since, cpu = time.perf_counter(), time.process_time()
                trainer.train_step()
                clock, processor = clock + time.perf_counter() - since, processor + time.process_time() - cpu
            if update % options.every == 0 or update == most:
                c = trainer.config
                line = {
                    "update": update,
                    "seconds": clock,
                    "cpu": processor,
                    "reward": held_out(trainer),
                    "samples": update * c.groups_per_update * c.group_size,
                    "memory": peak_memory(),
                }
                results.write(json.dumps(line) + "\n")
                results.flush()


def run(options: argparse.Namespace, preset: str, target: float) -> list[dict]:
    """The evaluations of one preset, until its smoothed reward reaches the target."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", preset, "--target", str(target)]
    lines: list[dict] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for text in child.stdout:
            lines.append(json.loads(text))
            print(
                f"  {preset:5} {lines[-1]['update']:4} {lines[-1]['seconds']:7.1f} s  {smoothed(lines):.4f}"
            )
            sys.stdout.flush()
            if smoothed(lines) >= target:
                child.terminate()
                break
    if not lines:
        sys.exit(f"{preset} made no evaluation: its messages are above")
    return lines


def smoothed(lines: list[dict]) -> float:
    last = [line["reward"] for line in lines[-SMOOTH:]]
    return sum(last) / len(last)


def main() -> None:
    options = parse()
    if options.one:
        return one(options)
    dance = run(options, "dance", float("inf"))
    target = smoothed(dance)
    fast = run(options, "fast", target)
    for name, lines in (("dance", dance), ("fast", fast)):
        end = lines[-1]
        pace = max(end["seconds"], 1e-9)
        print(
            f"{name:6} reward {lines[0]['reward']:.4f} -> {smoothed(lines):.4f} in {end['update']} updates, "
            f"{end['seconds']:.1f} s ({end['cpu']:.1f} s of CPU): {end['samples'] / pace:.2f} "
            f"samples and {end['update'] / pace:.3f} updates a second, peak {end['memory']:.0f} MB"
        )
    gained = target - dance[0]["reward"]
    if gained < LEAST:
        print(f"NOT met: dance gained {gained:+.4f}, less than {LEAST}, so there is nothing to reach")
        return
    reached = smoothed(fast) >= target
    wall, cpu = (fast[-1][key] / max(dance[-1][key], 1e-9) for key in ("seconds", "cpu"))
    print(f"fast {'reached' if reached else 'did not reach'} {target:.4f} in {wall:.3f}x the time of dance "
          f"({cpu:.3f}x its CPU time; limit {LIMIT:.3f})")  # fmt: skip
    print("met" if reached and wall <= LIMIT else "NOT met")


if __name__ == "__main__":
    main()
