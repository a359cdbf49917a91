"""Reward training on toy pipelines: on-policy ratio 1, kill -9, two processes, and what the file says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import diffusers
import pytest
import torch
from comfyui_diptych.models import lora
from comfyui_diptych.training import checkpoint, config, grpo, losses, rollout, screening, states, winners
from comfyui_diptych.training.grpo_config import GRPOConfig
from safetensors.torch import load_file

TOY = {
    "data": ["shapes:12?size=32"],
    "resolution": 32,
    "rank": 4,
    "max_steps": 2,
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
    "threads": 1,
    "rewards": ["shapes"],
    "rollout_steps": 4,
    "rollout_guidance": 3.0,
    "window_size": 2,
    "group_size": 4,
    "micro_batch": 2,
    "groups_per_update": 2,
    "clip": 1e-2,
}
NFT = {"algorithm": "nft", "nft_old_max": 0.0, "nft_shared_noise": True, "micro_batch": 8}


@pytest.fixture(scope="session")
def toys(tmp_path_factory, fill_pipeline, kontext_pipeline, sd_inpaint_pipeline):
    root = tmp_path_factory.mktemp("grpo_toys")
    for name, pipeline in (
        ("fill", fill_pipeline),
        ("kontext", kontext_pipeline),
        ("sd_inpaint", sd_inpaint_pipeline),
    ):
        pipeline.save_pretrained(root / name)
    (root / "toy_judge.py").write_text(
        "def brightness(images, prompts, sources, masks):\n    return images.mean((1, 2, 3))\n"
    )
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))


def toy(toys, output, task="fill", **options):
    values = {**TOY, "rewards": ["toy_judge:brightness"], "task": task, "model": str(toys / task)}
    return config.from_dict({**values, "output_dir": str(output), **options}, GRPOConfig)


def log(folder):
    return [json.loads(line) for line in (folder / "rewards.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("rule", ["flow", "dance", "cps", "rf_ancestral"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_ratio_is_one_on_unchanged_weights(toys, tmp_path, rule, storage):
    c = toy(toys, tmp_path, rule=rule, storage_dtype=storage, max_steps=1, window_size=2)
    trainer = grpo.GRPOTrainer(c)
    trainer.run()
    assert abs(log(tmp_path)[0]["ratio"] - 1) < 1e-6
    assert log(tmp_path)[0]["clipped"] == 0


@pytest.mark.parametrize("task", ["kontext", "sd_inpaint"])
def test_other_families_are_on_policy_too(toys, tmp_path, task):
    data = ["shapes:12?size=32&task=inpaint"] if task == "sd_inpaint" else TOY["data"]
    options = {"rollout_guidance": 1.0} if task == "sd_inpaint" else {}
    grpo.GRPOTrainer(toy(toys, tmp_path, task=task, max_steps=1, data=data, **options)).run()
    assert abs(log(tmp_path)[0]["ratio"] - 1) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "nft"},
        NFT,
        {"kl_beta": 1e-3, "ratio_norm": True},
        {"shared_prefix": True, "window": "fixed", "window_first": 1, "window_size": 1},
        {"inner_updates": 2, "ema": 0.9, "advantage_scale": "group"},
    ],
    ids=["nft", "nft_on_policy", "kl", "prefix", "inner"],
)
def test_options_run_and_move_the_weights(toys, tmp_path, options):
    path = grpo.GRPOTrainer(toy(toys, tmp_path, **options)).run()
    weights = lora.read(path)
    assert any(module.dense().abs().max() > 0 for module in weights.modules.values())
    assert weights.info.algorithm == options.get("algorithm", "grpo")
    assert "toy_judge" in weights.info.reward
    if "algorithm" not in options:
        high, low = weights.info.sigma_window
        assert 1 >= high > low > 0


@pytest.mark.parametrize("task", ["fill", "sd_inpaint"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_true_prediction_gives_the_clean_latents_back(toys, tmp_path, task, kind):
    if (task, kind) == ("fill", "v_prediction"):
        pytest.skip("flow models predict one thing")
    trainer = grpo.GRPOTrainer(toy(toys, tmp_path, task, data=["shapes:12?size=32&task=inpaint"]))
    trainer.prepare()
    policy, x0, noise = trainer.policy, torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    x, time = policy.noised(x0, noise, torch.tensor([0.02, 0.5, 0.98]))
    truth = noise - x0
    if task == "sd_inpaint":
        trainer.task.scheduler_config["prediction_type"] = kind
        scheduler = diffusers.DDIMScheduler.from_config(trainer.task.scheduler_config)
        torch.testing.assert_close(x, scheduler.add_noise(x0, noise, time))
        truth = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, time)
    torch.testing.assert_close(policy.data(x, time, truth), x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "init_lora"])
def test_kl_is_the_distance_from_the_model_before_the_run(toys, tmp_path, algorithm, begun):
    options = {"algorithm": algorithm, "kl_beta": 1.0, "group_size": 2}
    if begun:
        other = grpo.GRPOTrainer(toy(toys, tmp_path / "other", **options))
        other.prepare()
        for parameter in other.names.values():
            parameter.data.normal_(std=0.05)
        options["init_lora"] = str(other.export())
    trainer = grpo.GRPOTrainer(toy(toys, tmp_path, **options))
    trainer.prepare()
    batch = trainer.rollout_batch(trainer.batches, [0])
    x, sigma = torch.randn_like(batch["latents"]), torch.tensor([0.5])
    with torch.no_grad():
        start = trainer.policy.predict(x, sigma, batch, 3.0)
        assert torch.equal(trainer.reference(x, sigma, batch), start)
        for parameter in trainer.names.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        moved = trainer.policy.predict(x, sigma, batch, 3.0)
        assert not torch.equal(moved, start)
        assert torch.equal(trainer.reference(x, sigma, batch), start)
        assert torch.equal(trainer.policy.predict(x, sigma, batch, 3.0), moved)  # the weights came back
    trainer.train_step()  # the weights that were swapped are those that gradients flow to
    assert trainer.measures["kl"] > 0


@pytest.mark.parametrize("kl_beta", [0.0, 0.5])
def test_kl_enters_the_loss_as_the_mean_squared_distance(toys, tmp_path, kl_beta):
    trainer = grpo.GRPOTrainer(toy(toys, tmp_path, kl_beta=kl_beta, clip=10.0))
    trainer.prepare()
    rows = [0, 1]
    (made, *_) = rollout.collect(
        trainer.policy,
        lambda numbers: trainer.rollout_batch(trainer.batches, numbers),
        rows,
        rows,
        group_size=4,
        micro_batch=2,
        sampling=trainer.sampling,
        window=trainer.window,
        seed=0,
    )
    step = made.transitions[0]
    with torch.no_grad():
        start = trainer.policy.predict(step.x, step.time, made.batch, 3.0)
        for name, parameter in trainer.names.items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        moved = trainer.policy.predict(step.x, step.time, made.batch, 3.0)
        loss, _ = trainer.objective(made, 0, torch.zeros(2))
    distance = ((moved - start) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss, kl_beta * distance, atol=1e-6, rtol=1e-4)


KILLED = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[2])
from comfyui_diptych.training import config, grpo
from comfyui_diptych.training.grpo_config import GRPOConfig
def die(report):
    if report.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
values = json.load(open(sys.argv[1]))
grpo.GRPOTrainer(config.from_dict(values, GRPOConfig), on_report=die).run()
"""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"algorithm": "nft", "nft_targets": True, "data_rows": 5, "data_states": 2, "sample_steps": 3},
        {"algorithm": "nft", "winner_states": 2},
    ],
    ids=["grpo", "nft", "winners"],
)
def test_resume_after_kill_is_bit_equal(toys, tmp_path, options):
    options = {
        **options,
        "max_steps": 3,
        "save_every": 1,
        "ema": 0.9,
        "eval_rows": 2,
        "eval_every": 1,
    }
    straight = grpo.GRPOTrainer(toy(toys, tmp_path / "a", **options)).run()
    c = toy(toys, tmp_path / "b", **options, resume="auto")
    recipe = tmp_path / "recipe.json"
    keep = {k: v for k, v in vars(c).items() if v is not None}
    recipe.write_text(json.dumps(keep))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(recipe), str(toys)], capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()[-2000:]
    assert len(checkpoint.folders(tmp_path / "b" / "checkpoints")) == 1
    resumed = grpo.GRPOTrainer(c).run()
    first, second = load_file(straight), load_file(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "options",
    [
        {"data_rows": 2, "data_states": 2, "sample_steps": 3},
        {**NFT, "group_clip": 0.02, "data_rows": 2, "nft_targets": True},
        {**NFT, "group_clip": 0.02, "winner_states": 2},
        {**NFT, "nft_times": 0, "winner_states": 3, "mixed_precision": "auto"},
    ],
    ids=["grpo", "nft", "winners", "winners_alone"],
)
def test_two_processes_make_the_first_update_of_one_with_all_groups(toys, tmp_path, options):
    common = {"max_steps": 1, "cache_dir": str(tmp_path / "cache"), "lr": 1e-2, "data_weight": 0.1}
    whole = {**options, "groups_per_update": 4, "data_rows": 2 * options.get("data_rows", 0)}
    one = grpo.GRPOTrainer(toy(toys, tmp_path / "one", **common, **whole)).run()
    c = toy(toys, tmp_path / "two", groups_per_update=2, **common, **options)
    recipe = tmp_path / "two.yaml"
    recipe.write_text(json.dumps({k: v for k, v in vars(c).items() if v is not None}))
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(toys),
    }
    command = [sys.executable, "-m", *launch, "-m", "comfyui_diptych", "grpo", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (log(tmp_path / name)[0] for name in ("one", "two"))
    assert first["reward/toy_judge:brightness"] == pytest.approx(
        second["reward/toy_judge:brightness"], abs=1e-6
    )
    a, b = load_file(one), load_file(tmp_path / "two" / one.name)
    assert max(t.abs().max().item() for k, t in a.items() if "lora_B" in k) > 1e-3
    assert max((a[k] - b[k]).abs().max().item() for k in a) <= 1e-5
    assert (tmp_path / "two" / "rewards.png").is_file()
    assert (tmp_path / "two" / "before_after.png").is_file()


def test_nft_serves_epsilon_models_too(toys, tmp_path):
    c = toy(toys, tmp_path, "sd_inpaint", algorithm="nft", data=["shapes:12?size=32&task=inpaint"])
    trainer = grpo.GRPOTrainer(c)
    trainer.run()
    assert any(t.abs().max() > 0 for name, t in trainer.names.items() if "lora_B" in name)


def test_whole_groups_in_one_pass_make_the_same_pictures(toys, tmp_path):
    made = []
    for size in (2, 4, 8):
        c = toy(
            toys, tmp_path / str(size), micro_batch=size, shared_prefix=True, window_first=1, window="fixed"
        )
        trainer = grpo.GRPOTrainer(c)
        trainer.prepare()
        rollouts = rollout.collect(
            trainer.policy,
            lambda numbers, trainer=trainer: trainer.rollout_batch(trainer.batches, numbers),
            [3, 5],
            [0, 1],
            group_size=4,
            micro_batch=size,
            sampling=trainer.sampling,
            window=(1, 3),
            seed=0,
        )
        assert [len(r.latents) for r in rollouts] == [size] * (8 // size)
        assert [m for r in rollouts for m in r.members] == list(range(8))
        made.append(torch.cat([r.latents for r in rollouts]))
    torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made[0], made[2], atol=1e-4, rtol=1e-4)


def update_gradients(trainer, keep, advantage, data=()):
    """The gradient that one update takes, with these advantages [3 groups, 4]; the weights stay."""
    taken = {}

    def step(*_):
        taken.update({name: p.grad.clone() for name, p in trainer.names.items()})

    rollouts = rollout.collect(
        trainer.policy,
        lambda numbers: trainer.rollout_batch(trainer.batches, numbers),
        [0, 1, 2],
        [0, 1, 2],
        group_size=4,
        micro_batch=trainer.config.micro_batch,
        sampling=trainer.sampling,
        window=None,
        seed=0,
        states=trainer.config.winner_states,
    )
    sizes = [len(r.latents) for r in rollouts]
    trainer._kept, trainer.optimizer.step = int(keep.sum()), step
    worth = list(zip(advantage.flatten().split(sizes), keep.flatten().split(sizes), strict=True))
    if trainer.config.winner_states:
        rollouts = winners.aimed(rollouts, worth, 4)
    trainer._update(rollouts, worth, list(data))
    return taken


def norm(gradients):
    return torch.cat([g.flatten() for g in gradients.values()]).norm()


@pytest.mark.parametrize("micro_batch", [12, 2], ids=["groups_together", "group_in_parts"])
def test_no_group_pulls_harder_than_its_limit(toys, tmp_path, micro_batch):
    options = {**NFT, "micro_batch": micro_batch, "grad_clip": 0.0, "nft_times": 2}
    advantage = torch.tensor([[1.0, -1.0, 2.0, -2.0], [0.1, -0.1, 0.1, -0.1], [3.0, 1.0, -4.0, 0.0]])
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[2, 3] = False
    made = {}
    for limit in (0.0, 1e6, 0.1):
        trainer = grpo.GRPOTrainer(toy(toys, tmp_path, **options, group_clip=limit))
        trainer.prepare()
        for index, parameter in enumerate(trainer.names.values()):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
        made[limit] = update_gradients(trainer, keep, advantage)
        if limit == 0.0:
            alone = []
            for group in range(3):
                only = torch.zeros_like(keep)
                only[group] = keep[group]
                alone.append(update_gradients(trainer, only, advantage))  # the mean over this group's samples
    norms = [float(norm(g)) for g in alone]
    assert min(norms) < 0.1 < max(norms)  # else the limit says nothing
    for name, value in made[0.0].items():
        torch.testing.assert_close(made[1e6][name], value, atol=1e-6, rtol=1e-4)
        wanted = sum(
            g[name] * min(1, 0.1 / n) * int(k.sum()) for g, n, k in zip(alone, norms, keep, strict=True)
        )
        torch.testing.assert_close(made[0.1][name], wanted / int(keep.sum()), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("limit", [0.0, 0.1])
def test_rows_of_the_data_add_their_supervised_gradient(toys, tmp_path, limit):
    options = {**NFT, "micro_batch": 4, "grad_clip": 0.0, "group_clip": limit}
    trainer = grpo.GRPOTrainer(toy(toys, tmp_path, **options, data_rows=5, data_weight=3.0))
    trainer.prepare()
    for index, parameter in enumerate(trainer.names.values()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
    advantage = torch.tensor([[1.0, -1.0, 2.0, -2.0], [0.1, -0.1, 0.1, -0.1], [3.0, 1.0, -4.0, 0.0]])
    keep = torch.ones(3, 4, dtype=torch.bool)
    without = update_gradients(trainer, keep, advantage)
    added = update_gradients(trainer, keep, advantage, data=[7, 1, 4, 0, 9])
    batch = trainer.batches([7, 1, 4, 0, 9], [False] * 5)
    places = list(range(5))
    noise = losses.row_noise(0, [states.DATA + place for place in places], batch["latents"].shape[1:])
    loss = 3 * trainer.task.row_losses(batch, noise, losses.row_uniform(0, places, "data")).mean()
    alone = torch.autograd.grad(loss, list(trainer.names.values()))
    for (name, value), gradient in zip(added.items(), alone, strict=True):
        torch.testing.assert_close(value - without[name], gradient, atol=2e-5, rtol=1e-3)
    only = update_gradients(trainer, torch.zeros_like(keep), advantage, data=[7, 1, 4, 0, 9])
    for value, gradient in zip(only.values(), alone, strict=True):  # no group teaches: the data still do
        torch.testing.assert_close(value, gradient, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("task", ["kontext", "sd_inpaint"])
def test_data_states_are_those_of_sampling_and_lead_to_the_wanted_picture(toys, tmp_path, task):
    data = ["shapes:12?size=32&task=inpaint"] if task == "sd_inpaint" else TOY["data"]
    options = {"data": data, "data_rows": 3, "data_states": 2, "sample_steps": 4, "rollout_guidance": 2.0}
    trainer = grpo.GRPOTrainer(toy(toys, tmp_path, task, algorithm="nft", grad_clip=0.0, **options))
    trainer.prepare()
    batch, noise = trainer._with_noise([4, 2, 7], [False] * 3, [states.DATA + place for place in range(3)])
    batch = trainer.task.guided(batch, trainer.batches.text, 2.0)
    sampling = rollout.Sampling(4, 2.0)
    visited = states.visited(trainer.policy, batch, noise, sampling)
    assert len(visited) == 3
    # From any state the remaining steps of a plain loop end where sampling ends.
    end, _ = trainer.policy.run(batch, noise, sampling, None, None)
    host, condition = trainer.task.host, trainer.task.condition(batch, 2.0)
    wanted, total = batch["latents"], []
    with torch.no_grad():
        for x, time in visited:
            if task == "kontext":
                data = x - time * host.velocity(x, time, condition)
                share = float(time) ** 2
            else:
                alpha = trainer.task.alpha_bar[int(time)]
                data = (x - (1 - alpha).sqrt() * host.epsilon(x, int(time), condition)) / alpha.sqrt()
                share = float((1 - alpha) / alpha)
            total.append((data - wanted).square().flatten(1).mean(1) / (share + 0.05))
        if task == "kontext":
            x, sigma = visited[-1]
            torch.testing.assert_close(
                x - sigma * host.velocity(x, sigma, condition), end, atol=1e-5, rtol=1e-5
            )
    for number in range(2):
        got = states.losses(trainer, batch, visited, range(3), number)
        picks = (losses.row_uniform(0, [0, 1, 2], f"state {number}") * 3).long().tolist()
        expected = torch.stack([total[pick][row] for row, pick in enumerate(picks)])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    states.learn(trainer, [4, 2, 7])
    taken = [p.grad.clone() for p in trainer.names.values()]
    mean = sum(states.losses(trainer, batch, visited, range(3), n).mean() for n in range(2)) / 2
    alone = torch.autograd.grad(mean, list(trainer.names.values()))
    for one, other in zip(taken, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("task", ["kontext", "sd_inpaint"])
@pytest.mark.parametrize("micro_batch", [2, 8], ids=["group_in_parts", "groups_together"])
def test_tries_are_learnt_where_they_came_through_towards_their_groups_best(
    toys, tmp_path, task, micro_batch
):
    data = ["shapes:12?size=32&task=inpaint"] if task == "sd_inpaint" else TOY["data"]
    options = {"data": data, "rollout_guidance": 1.0, "nft_times": 0, "winner_states": 2, "grad_clip": 0.0}
    options |= {**NFT, "nft_times": 0, "micro_batch": micro_batch, "rollout_steps": 4}
    trainer = grpo.GRPOTrainer(toy(toys, tmp_path, task, **options))
    trainer.prepare()
    for index, parameter in enumerate(trainer.names.values()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
    advantage = torch.tensor([[0.2, -1.5, 0.5, 0.1], [0.0, 0.4, -0.4, 0.0], [9.0, 0.0, 0.0, 0.0]])
    keep = torch.tensor([[True] * 4, [True, True, True, False], [False] * 4])
    taken = update_gradients(trainer, keep, advantage)

    # The same by hand: a plain loop for each try, its states, the errors towards the best's end and its own.
    best, pulls = [2, 1], [[0.3, 1.0, 0.0, 0.4], [0.4, 0.0, 0.8, 0.0]]
    sampling, total = rollout.Sampling(4, 1.0), torch.zeros(())
    for row in range(2):
        batch = trainer.rollout_batch(trainer.batches, [row])
        paths, ends = [], []
        for member in range(4 * row, 4 * row + 4):
            noise = losses.row_noise(0, [member], tuple(batch["latents"].shape[1:]))
            seen = []
            with torch.no_grad():
                end, _ = trainer.policy.run(batch, noise, sampling, None, None, callback=seen.append)
            paths.append(seen)
            ends.append(end)
        for place, pull in enumerate(pulls[row]):
            for number in range(2):
                u = losses.row_uniform(0, [4 * row + place], f"visited {number}")
                event = paths[place][1 + int(u * 3)]
                time = torch.as_tensor(event["sigma"] if task == "kontext" else event["t"]).reshape(1)
                prediction = trainer.policy.predict(event["x"], time, batch, 1.0)
                if task == "kontext":
                    reached, share = event["x"] - time * prediction, float(time) ** 2
                else:
                    alpha = trainer.task.alpha_bar[int(time)]
                    reached = (event["x"] - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
                    share = float((1 - alpha) / alpha)
                towards, back = ((reached - ends[end]).square().mean() for end in (best[row], place))
                total = total + pull * (towards - back) / (share + 0.05) / 2
    alone = torch.autograd.grad(total / int(keep.sum()), list(trainer.names.values()))
    for (name, value), gradient in zip(taken.items(), alone, strict=True):
        torch.testing.assert_close(value, gradient, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("micro_batch", [2, 3, 4, 8])
def test_the_wanted_picture_takes_the_last_place_of_a_group(toys, tmp_path, micro_batch):
    made = {}
    trainer = grpo.GRPOTrainer(toy(toys, tmp_path, algorithm="nft"))
    trainer.prepare()
    for targets in (False, True):
        made[targets] = rollout.collect(
            trainer.policy,
            lambda numbers: trainer.rollout_batch(trainer.batches, numbers),
            [3, 5],
            [0, 1],
            group_size=4,
            micro_batch=micro_batch,
            sampling=trainer.sampling,
            window=None,
            seed=0,
            targets=targets,
        )
        assert [m for r in made[targets] for m in r.members] == list(range(8))
    tries, given = (torch.cat([r.latents for r in made[targets]]) for targets in (False, True))
    wanted = trainer.batches([3, 5], [False, False])["latents"]
    assert torch.equal(given[[3, 7]], wanted)
    others = [0, 1, 2, 4, 5, 6]
    torch.testing.assert_close(given[others], tries[others], atol=1e-4, rtol=1e-4)


def test_wanted_pictures_are_judged_but_are_no_tries(toys, tmp_path):
    options = {**NFT, "nft_targets": True, "max_steps": 1, "rewards": ["shapes"]}
    trainer = grpo.GRPOTrainer(toy(toys, tmp_path, **options))
    seen = []
    real = grpo.policy.advantages

    def watched(scores, *rest, **options):
        seen.append(scores["shapes"])
        return real(scores, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.policy, "advantages", watched)
        trainer.run()
    tries = torch.tensor([0, 1, 2, 4, 5, 6])
    assert log(tmp_path)[0]["reward/shapes"] == pytest.approx(seen[0][tries].mean().item(), abs=1e-6)


def test_samples_that_teach_nothing_are_left_out_of_a_pass():
    def piece(first, count):
        members = list(range(first, first + count))
        values = torch.tensor(members, dtype=torch.float32)[:, None]
        batch = {"latents": values * 10, "prompts": [str(m) for m in members]}
        return rollout.Rollout(members, batch, values, ())

    made = rollout.kept_only([piece(0, 3), piece(3, 2)], [torch.tensor([0, 2]), torch.tensor([4])])
    assert [places.tolist() for _, places in made] == [[0, 2], [4]]
    assert [r.members for r, _ in made] == [[0, 2], [4]]
    assert made[0][0].batch["prompts"] == ["0", "2"]
    assert made[1][0].batch["latents"].tolist() == [[40.0]] and made[1][0].latents.tolist() == [[4.0]]


def tried_alone(trainer, count):
    """The score of every row, tried by itself instead of in micro-batches: the noise belongs to the row."""
    scores = [screening.try_rows(trainer, trainer.batches, [n])["toy_judge:brightness"] for n in range(count)]
    return torch.cat(scores)


def test_screening_learns_on_the_rows_that_came_out_worst(toys, tmp_path):
    c = toy(toys, tmp_path, screen=0.5, screen_rows=8, max_steps=1)
    trainer = grpo.GRPOTrainer(c)
    trainer.prepare()
    scores = tried_alone(trainer, 12)
    first = trainer.screened._rows(8, 12)
    seen = [next(trainer.order), next(trainer.order)]
    assert sorted(sum(seen, [])) == sorted(sorted(first, key=lambda row: scores[row])[:4])
    # Eight more: the four that were not tried yet, and then others again.
    second = trainer.screened._rows(8, 12)
    assert set(second[:4]) == set(range(12)) - set(first)
    assert len(next(trainer.order)) == 2 and trainer.screened.round == 2


def test_rows_that_fill_no_update_wait_for_the_next_round(toys, tmp_path):
    trainer = grpo.GRPOTrainer(toy(toys, tmp_path, screen=0.1, screen_rows=6, max_steps=2))
    path = trainer.run()
    assert path.suffix == ".safetensors" and trainer.screened.round == 4  # one row a round, two an update


def test_screening_goes_on_from_a_checkpoint(toys, tmp_path):
    options = {"screen": 0.5, "screen_rows": 8, "max_steps": 3, "save_every": 1, "keep_last": 9}
    straight = grpo.GRPOTrainer(toy(toys, tmp_path, **options))
    straight.run()
    again = grpo.GRPOTrainer(
        toy(toys, tmp_path, **options, resume=str(tmp_path / "checkpoints" / "step_00000001"))
    )
    again.run()
    for name, value in straight.names.items():
        assert torch.equal(value, again.names[name]), name
    assert straight.screened.state() == again.screened.state()


def test_rows_that_no_reward_can_judge_end_the_screening(toys, tmp_path):
    (toys / "toy_nan.py").write_text(
        "def nothing(images, prompts, sources, masks):\n    return images.mean((1, 2, 3)) * float('nan')\n"
    )
    with pytest.raises(ValueError, match="could judge none of 4 rows"):
        grpo.GRPOTrainer(toy(toys, tmp_path, screen=0.5, screen_rows=4, rewards=["toy_nan:nothing"])).run()


def test_worst_leaves_failures_out():
    assert screening.worst([0.5, None, 0.1, float("nan"), 0.1, 0.9], 0.5) == [0, 2, 4]
    assert screening.worst([0.5, 0.4], 0.01) == [1]


def test_worst_leaves_out_what_is_as_good_as_the_best():
    assert screening.worst([1.0, 0.4, 1.0, 1.0], 0.9) == [1]
    assert screening.worst([1.0, 1.0, 1.0, 1.0], 0.5) == [0, 1]  # all are: the trial says nothing


def test_screening_may_try_rows_in_fewer_steps(toys, tmp_path):
    c = toy(toys, tmp_path, screen=0.5, screen_rows=8, screen_steps=1, max_steps=1)
    trainer = grpo.GRPOTrainer(c)
    trainer.prepare()
    first = trainer.screened._rows(8, 12)
    numbers = sorted(first)
    scores = screening.try_rows(trainer, trainer.batches, numbers, steps=1)["toy_judge:brightness"]
    wanted = sorted(numbers, key=lambda row: scores[numbers.index(row)])[:4]
    assert sorted(next(trainer.order) + next(trainer.order)) == sorted(wanted)


def test_guided_rollouts_of_sd_see_the_empty_prompt(toys, tmp_path):
    data = ["shapes:12?size=32&task=inpaint"]
    trainer = grpo.GRPOTrainer(toy(toys, tmp_path, "sd_inpaint", data=data, rollout_guidance=4.0))
    trainer.prepare()
    batch = trainer.rollout_batch(trainer.batches, [0, 3])
    x = torch.randn_like(batch["latents"])
    plain = {**batch, "tokens": batch["empty_tokens"]}
    with torch.no_grad():
        guided = trainer.policy.predict(x, 500, batch, 4.0)
        positive = trainer.policy.predict(x, 500, batch, 1.0)
        negative = trainer.policy.predict(x, 500, plain, 1.0)
    torch.testing.assert_close(guided, negative + 4 * (positive - negative), atol=1e-5, rtol=1e-5)


def test_a_failing_reward_is_counted_and_never_zero(toys, tmp_path):
    (toys / "toy_failing.py").write_text(
        "def judge(images, prompts, sources, masks):\n"
        "    scores = images.mean((1, 2, 3))\n    scores[0] = float('nan')\n    return scores\n"
    )
    grpo.GRPOTrainer(toy(toys, tmp_path, rewards=["toy_failing:judge"], max_steps=1)).run()
    entry = log(tmp_path)[0]
    assert entry["failed/toy_failing:judge"] == 1 and entry["kept"] == 7 / 8


def test_mistakes_are_one_sentence_before_anything_is_loaded(toys, tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        toy(toys, tmp_path, window_size=4)
    with pytest.raises(ValueError, match="nft_targets is for algorithm nft"):
        toy(toys, tmp_path, nft_targets=True)
    for options in ({}, {"algorithm": "nft", "nft_targets": True}, {"algorithm": "nft", "rollout_steps": 1}):
        with pytest.raises(ValueError, match="winner_states is for algorithm nft"):
            toy(toys, tmp_path, winner_states=2, **({"window_size": 1} | options))
    with pytest.raises(ValueError, match="nft_times is 0: it may be 0 with winner_states only"):
        toy(toys, tmp_path, algorithm="nft", nft_times=0)
    for options in ({"data_rows": 4}, {"algorithm": "nft", "nft_targets": True}):
        with pytest.raises(ValueError, match="use_targets is false"):
            toy(toys, tmp_path, use_targets=False, **options)
    with pytest.raises(ValueError, match="rewards is empty"):
        grpo.GRPOTrainer(toy(toys, tmp_path, rewards=[])).run()
    with pytest.raises(ValueError, match="NAME.KEY=VALUE"):
        grpo.GRPOTrainer(toy(toys, tmp_path, reward_options=["pickscore.path=x"])).run()
