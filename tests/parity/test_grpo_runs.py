"""Reward training on toy pipelines: on-policy ratio 1, kill -9, two processes, and what the file says."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from comfyui_diptych.models import editing, lora
from comfyui_diptych.models.sd_inpaint import SDInpaint
from comfyui_diptych.samplers import ddim, schedule
from comfyui_diptych.training.data import specs
from comfyui_diptych.training.reinforce import rollout, scoring
from comfyui_diptych.training.reinforce import trainer as grpo
from comfyui_diptych.training.runtime import checkpoint, optim, processes, resume
from comfyui_diptych.training.runtime.random_streams import row_noise, row_uniform
from comfyui_diptych.training.tasks import adapters
from comfyui_diptych.training.tasks.sampling import RolloutSettings
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file
from toys import INPAINT, two_processes, write_recipe
from toys import reward_config as toy

NFT = {"algorithm": "nft", "nft_old_max": 0.0, "nft_shared_noise": True, "micro_batch": 8}


def log(folder):
    return [json.loads(line) for line in (folder / "rewards.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def begun(folders, tmp_path_factory):
    """Prepared trainers by task, whose LoRA is not zero; a test orders the options it is about."""
    made = {}

    def get(task):
        c = toy(folders, tmp_path_factory.mktemp(task), task)
        if task not in made:
            made[task] = grpo.GRPOTrainer(c)
            made[task].prepare()
        randomise(made[task])
        made[task].config = c
        return made[task]

    return get


def randomise(trainer, std=0.1):
    for index, parameter in enumerate(trainer.model.parameters.values()):
        torch.nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(index))
    trainer._make_objective()  # DiffusionNFT's old policy begins at these weights


def ordered(trainer, **options):
    """The trainer with other options, as if it had begun with them."""
    trainer.config = c = dataclasses.replace(trainer.config, **{"grad_clip": 0.0, **options})
    optimizer = trainer.accelerator.prepare(optim.make_optimizer(trainer.model.parameters.values(), c))
    trainer.model = dataclasses.replace(trainer.model, optimizer=optimizer)
    trainer.position.step = 0
    trainer._make_objective()
    return trainer


def scored(trainer, rollouts, advantage, keep):
    """The rollouts as an update takes them, with these advantages and marks [N]."""
    return trainer.objective.prepared(rollout.with_advantages(rollouts, advantage, keep))


@pytest.mark.parametrize(
    "task, rule",
    [
        *(("fill", rule) for rule in ("flow", "dance", "cps", "rf_ancestral")),
        ("kontext", "flow"),
        ("sd_inpaint", ""),
        ("glid", ""),
    ],
)
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_ratio_is_one_on_unchanged_weights_and_only_there(begun, task, rule, storage):
    options = {"rule": rule} if rule else {"rollout_guidance": 1.0}
    trainer = ordered(begun(task), storage_dtype=storage, clip=1e-2, **options)
    made = trainer.roll_out([0], [0])
    (made, *_) = scored(trainer, made, torch.ones(4), torch.ones(4, dtype=torch.bool))
    assert len(made.transitions) == 2
    for number in range(2):
        with torch.no_grad():
            _, kept = trainer.objective.loss(made, number)
            with trainer.reference.active():
                _, changed = trainer.objective.loss(made, number)
        assert (kept["ratio"] - 1).abs().max() < 1e-6 and not kept["clipped"].any()
        assert (changed["ratio"] - 1).abs().min() > 1e-5


UPDATES = {
    "grpo": {},
    "grpo_inner": {"inner_updates": 2, "advantage_scale": "group"},
    "grpo_prefix": {"shared_prefix": True, "window": "fixed:1", "window_size": 1},
    "grpo_kl": {"kl_beta": 1e-3},
    "nft": {"algorithm": "nft"},
    "nft_on_policy": NFT,
    "contrastive": {**NFT, "nft_times": 0, "contrastive_states": 3},
}


@pytest.mark.parametrize(
    "task, name",
    [
        *((task, name) for task in ("fill", "sd_inpaint") for name in UPDATES),
        ("glid", "grpo"),
        ("glid", "nft"),
    ],
)
def test_an_update_makes_what_was_judged_better_likelier(begun, task, name):
    """By the probability of the recorded steps, or by the error of predicting the sample from noise on it."""
    if task == "sd_inpaint" and name == "grpo_prefix":
        pytest.skip("refused by the configuration")
    trainer = ordered(begun(task), lr=1e-4, rollout_guidance=1.0, **UPDATES[name])
    rollouts, c = trainer.roll_out([0, 1], [0, 1]), trainer.config
    rollouts, kept = trainer._compared(rollouts, trainer._scores(rollouts, [0, 1]), [0, 1])
    advantage = torch.cat([made.advantage for made in rollouts])
    assert advantage.abs().max() > 0.5 and kept == 8

    @torch.no_grad()
    def liking():
        found = []
        for made in rollouts:
            if c.algorithm == "grpo":
                steps = made.transitions
                replayed = [
                    step.replay(trainer.task.predict(step.x, step.time, made.batch, 1.0)) for step in steps
                ]
                ratios = [s.log_ratio(r.mean) for s, r in zip(steps, replayed, strict=True)]
                found.append(torch.stack(ratios).sum(0))
                continue
            level = torch.full((len(made.members),), 0.6)
            noise = torch.randn(made.latents.shape[1:], generator=torch.Generator().manual_seed(5))
            x, time = trainer.task.noised(made.latents, noise.expand_as(made.latents), level)
            data = trainer.task.data_prediction(x, time, trainer.task.predict(x, time, made.batch, 1.0))
            found.append(-(data - made.latents).square().flatten(1).mean(1))
        return torch.cat(found)

    before = liking()
    whole = len(rollouts) // c.inner_updates
    for start in range(0, len(rollouts), whole):
        trainer.update(rollouts[start : start + whole], kept, [], c.inner_updates)
    likelier = liking() - before
    assert (likelier * advantage).mean() > 0.1 * likelier.abs().mean() * advantage.abs().mean() > 0


def test_a_run_says_what_it_was(folders, tmp_path):
    options = {"window": "fixed:1", "ema": 0.9, "kl_beta": 1e-3}
    info = lora.read(grpo.GRPOTrainer(toy(folders, tmp_path, **options)).run()).info
    sigmas = schedule.sigmas(4, seq_len=schedule.token_count(4, 8)).tolist()
    assert (info.algorithm, info.reward, info.step) == ("grpo", "toy_judge:brightness x 1", 2)
    assert info.sigma_window == pytest.approx((sigmas[1], sigmas[3]))


def test_glid_learns_by_reward_and_its_file_fits_a_fresh_model(folders, tmp_path):
    """The file, on a glid that was loaded anew, predicts what the trainer's model does."""
    from comfyui_diptych.models.glid.model import Glid

    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, "glid", rollout_guidance=1.0, lr=1e-2))
    file = lora.read(trainer.run())
    assert (file.info.algorithm, file.info.step) == ("grpo", 2)
    batch = trainer.sampling_batch(trainer.data.batches, [0])
    noise, time = torch.randn(batch["latents"].shape), torch.tensor([501])
    with torch.no_grad():
        expected = trainer.task.predict(noise, time, batch, 1.0)
    fresh = Glid.load(trainer.config.model, dtype=torch.float32)
    condition = trainer.task.condition(batch, 1.0)
    with torch.no_grad():
        without = fresh.epsilon(noise, time, condition)
        lora.apply_to_diffusers(fresh.unet, file)
        made = fresh.epsilon(noise, time, condition)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    assert (made - without).abs().max() > 1e-3


def test_a_stable_diffusion_lora_works_at_the_trained_timesteps(folders, tmp_path):
    """Header, loader and sampler count alike: trained in steps 1 and 2 of 4, on there and nowhere else."""
    options = {"window": "fixed:1", "rollout_guidance": 1.0, "max_steps": 1}
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, "sd_inpaint", **options))
    file = lora.read(trainer.run())
    trained = [step.time for step in trainer.roll_out([0], [0])[0].transitions]
    assert trained == [501, 251] and file.info.sigma_window == (0.501, 0.001)
    denoiser = SDInpaint.load(folders / "sd_inpaint", dtype=torch.float32)
    handle = lora.apply_to_diffusers(denoiser.unet, file)
    active, real = [], denoiser.epsilon

    def epsilon(x, timestep, condition):
        layers = [m for m in denoiser.unet.modules() if isinstance(m, BaseTunerLayer)]
        active.append((int(timestep), any(m.scaling.get(handle.adapter) for m in layers)))
        return real(x, timestep, condition)

    denoiser.epsilon = epsilon
    image, mask = torch.rand(1, 32, 32, 3), torch.ones(1, 32, 32)
    sampling = editing.Sampling(steps=4, at_sigma=handle.at_sigma)
    editing.inpaint_sd(denoiser, image, mask, "red", cfg=1.0, sampling=sampling)
    assert active == [(751, False), (501, True), (251, True), (1, False)]


@pytest.mark.parametrize("task", ["fill", "sd_inpaint", "glid"])
def test_held_out_images_are_made_as_loaders_use_the_file(begun, task):
    """The LoRA is on in the window only: equal to a plain loop that switches it by hand."""
    trainer = begun(task)
    family, plain = trainer.task, RolloutSettings(4, 1.0)
    batch = trainer.sampling_batch(trainer.data.batches, [0])
    noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(0))
    window = family.level_range(4, (1, 3), *noise.shape[-2:])
    made, _ = family.rollout(batch, noise, dataclasses.replace(plain, lora_window=window))
    flow = schedule.sigmas(4, seq_len=schedule.token_count(*noise.shape[-2:]))
    times = flow if task == "fill" else ddim.schedule(4, trainer.task.scheduler_config).timesteps
    alphas = None if task == "fill" else ddim.schedule(4, trainer.task.scheduler_config).alphas
    x = noise
    for number in range(4):
        off = adapters.switched_off(trainer.model.parts[trainer.task.denoiser_part])
        with torch.no_grad(), nullcontext() if number in (1, 2) else off:
            predicted = family.predict(x, times[number], batch, 1.0)
        if task == "fill":
            x = x + (flow[number + 1] - flow[number]) * predicted
        else:
            x = ddim.step(x, predicted, alphas[number], alphas[number + 1]).x_next
    torch.testing.assert_close(made, x, atol=1e-5, rtol=1e-5)
    everywhere, _ = family.rollout(batch, noise, plain)
    assert (made - everywhere).abs().max() > 1e-4


@pytest.mark.parametrize("task", ["fill", "sd_inpaint"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_true_prediction_gives_the_clean_latents_back(folders, tmp_path, task, kind):
    if (task, kind) == ("fill", "v_prediction"):
        pytest.skip("flow models predict one thing")
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, task, data=INPAINT))
    trainer.prepare()
    family, x0, noise = trainer.task, torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    x, time = family.noised(x0, noise, torch.tensor([0.02, 0.5, 0.98]))
    truth = noise - x0
    if task == "sd_inpaint":
        trainer.task.scheduler_config["prediction_type"] = kind
        scheduler = diffusers.DDIMScheduler.from_config(trainer.task.scheduler_config)
        torch.testing.assert_close(x, scheduler.add_noise(x0, noise, time))
        truth = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, time)
    torch.testing.assert_close(family.data_prediction(x, time, truth), x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "init_lora"])
def test_kl_is_the_distance_from_the_model_before_the_run(folders, tmp_path, algorithm, begun):
    options = {"algorithm": algorithm, "kl_beta": 1.0, "group_size": 2}
    if begun:
        other = grpo.GRPOTrainer(toy(folders, tmp_path / "other", **options))
        other.prepare()
        for parameter in other.model.parameters.values():
            parameter.data.normal_(std=0.05)
        options["init_lora"] = str(other.export())
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, **options))
    trainer.prepare()
    batch = trainer.sampling_batch(trainer.data.batches, [0])
    x, sigma = torch.randn_like(batch["latents"]), torch.tensor([0.5])
    with torch.no_grad():
        start = trainer.task.predict(x, sigma, batch, 3.0)
        assert torch.equal(trainer.reference.predict(x, sigma, batch), start)
        for parameter in trainer.model.parameters.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        moved = trainer.task.predict(x, sigma, batch, 3.0)
        assert not torch.equal(moved, start)
        assert torch.equal(trainer.reference.predict(x, sigma, batch), start)
        assert torch.equal(trainer.task.predict(x, sigma, batch, 3.0), moved)  # the weights came back
    trainer.train_step()  # the weights that were swapped are those that gradients flow to
    assert trainer.measures["kl"] > 0


@pytest.mark.parametrize("kl_beta", [0.0, 0.5])
def test_kl_enters_the_loss_as_the_mean_squared_distance(folders, tmp_path, kl_beta):
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, kl_beta=kl_beta, clip=10.0))
    trainer.prepare()
    made = trainer.roll_out([0, 1], [0, 1])
    (made, *_) = scored(trainer, made, torch.zeros(8), torch.ones(8, dtype=torch.bool))
    step = made.transitions[0]
    with torch.no_grad():
        start = trainer.task.predict(step.x, step.time, made.batch, 3.0)
        for name, parameter in trainer.model.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        moved = trainer.task.predict(step.x, step.time, made.batch, 3.0)
        loss, _ = trainer.objective.loss(made, 0)
    distance = ((moved - start) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss, kl_beta * distance, atol=1e-6, rtol=1e-4)


# One process for all runs, since it takes longer to start than to run: each is a fork of it and is killed.
KILLED = """
import json, os, signal, sys
import accelerate, peft  # here and not in every fork
from diffusers import AutoencoderKL, DiffusionPipeline, FluxTransformer2DModel
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
from comfyui_diptych.training import recipes
from comfyui_diptych.training.reinforce import trainer as grpo
from comfyui_diptych.training.reinforce.config import GRPOConfig
def die(report):
    if report.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
for recipe in sys.argv[1:]:
    child = os.fork()
    if not child:
        values = json.load(open(recipe))
        grpo.GRPOTrainer(recipes.from_dict(values, GRPOConfig), on_report=die).run()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, recipe
"""
TO_KILL = {
    "grpo": {},
    "nft": {"algorithm": "nft", "data_rows": 5},
    "contrastive": {"algorithm": "nft", "contrastive_states": 2},
}
TO_KILL = {
    name: {**options, "max_steps": 3, "save_every": 1, "ema": 0.9, "eval_rows": 2, "eval_every": 1}
    for name, options in TO_KILL.items()
}


@pytest.fixture(scope="module")
def killed(folders, tmp_path_factory):
    """The folder of runs that were killed after their second update, before its checkpoint."""
    root = tmp_path_factory.mktemp("killed")
    recipes = [
        write_recipe(
            toy(folders, root / name, **options, cache_dir=str(root / "cache")), root / f"{name}.json"
        )
        for name, options in TO_KILL.items()
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folders), *sys.path])}
    command = [sys.executable, "-c", KILLED, *map(str, recipes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.mark.parametrize("name", TO_KILL)
def test_resume_after_kill_is_bit_equal(folders, tmp_path, killed, name):
    options = {**TO_KILL[name], "cache_dir": str(killed / "cache")}
    straight = grpo.GRPOTrainer(toy(folders, tmp_path, **options)).run()
    assert len(checkpoint.folders(killed / name / "checkpoints")) == 1
    resumed = grpo.GRPOTrainer(toy(folders, killed / name, **options, resume="auto")).run()
    first, second = load_file(straight), load_file(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# One launch for all runs, since starting two processes takes longer than the runs do. Every run is one of the
# command line, but the group of processes stays for the next.
RUNS = """
import sys
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from comfyui_diptych.cli import main
Accelerator.end_training = lambda self: None
for recipe in sys.argv[1:]:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    assert main(["grpo", recipe]) == 0, recipe
"""
SHARED = {"max_steps": 1, "lr": 1e-2, "eval_every": 1}
# Held-out rows: one process has none, each has one, one has more.
IN_TWO = {
    "grpo": {"data_rows": "2@0.1", "eval_rows": 1},
    "nft": {**NFT, "group_clip": 0.02, "data_rows": "2@0.1", "eval_rows": 2},
    "contrastive": {**NFT, "group_clip": 0.02, "contrastive_states": 2, "eval_rows": 3},
    "contrastive_alone": {**NFT, "nft_times": 0, "contrastive_states": 3, "mixed_precision": "auto"},
}


@pytest.fixture(scope="module")
def in_two(folders, tmp_path_factory):
    """The folder of all runs of two processes, by name."""
    root = tmp_path_factory.mktemp("in_two")
    options = {**SHARED, "cache_dir": str(root / "cache")}
    recipes = [
        write_recipe(toy(folders, root / name, **options, **own), root / f"{name}.yaml")
        for name, own in IN_TWO.items()
    ]
    (root / "runs.py").write_text(RUNS)
    two_processes(root / "runs.py", *recipes, environment={"PYTHONPATH": str(folders)})
    return root


@pytest.mark.parametrize("name", IN_TWO)
def test_two_processes_make_the_first_update_of_one_with_all_groups(folders, tmp_path, in_two, name):
    whole = {**SHARED, **IN_TWO[name], "groups_per_update": 4, "cache_dir": str(in_two / "cache")}
    if "data_rows" in whole:
        whole["data_rows"] = "4@0.1"
    one = grpo.GRPOTrainer(toy(folders, tmp_path, **whole)).run()
    first, second = log(tmp_path)[0], log(in_two / name)[0]
    judge = "reward/toy_judge:brightness"
    assert first[judge] == pytest.approx(second[judge], abs=1e-6)
    last = "checkpoints/step_00000001"
    a, b = (
        checkpoint.read_tensors(folder / last, "trained.safetensors") for folder in (tmp_path, in_two / name)
    )
    assert max(t.abs().max().item() for k, t in a.items() if "lora_B" in k) > 1e-3
    apart = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])
    # Adam's first step is as long where the gradient is nothing but rounding.
    assert (apart > 1e-5).float().mean() < 1e-3 and apart.mean() < 1e-6
    assert (in_two / name / one.name).is_file()
    assert (in_two / name / "rewards.png").is_file() and (in_two / name / "before_after.png").is_file()
    alone, shared = (checkpoint.read_state(folder / last)["history"] for folder in (tmp_path, in_two / name))
    assert len(alone) == len(shared) == 2 * bool(IN_TWO[name].get("eval_rows"))
    for ours, theirs in zip(alone, shared, strict=True):
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-5)


def test_as_many_held_out_rows_are_judged_as_were_asked_for(folders, tmp_path):
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, eval_rows=2, max_steps=1))
    trainer.prepare()
    trainer.evaluate()
    alone = [trainer.held_out_scores([n]) for n in (0, 1)]
    means = torch.cat([scores["toy_judge:brightness"] for scores in alone]).mean().item()
    assert trainer.held_out.history[0]["value"] == pytest.approx(means, abs=1e-6)


def test_whole_groups_in_one_pass_make_the_same_images(folders, tmp_path):
    made = []
    for size in (2, 4, 8):
        options = {"shared_prefix": True, "window": "fixed:1"}
        c = toy(folders, tmp_path / str(size), micro_batch=size, **options)
        trainer = grpo.GRPOTrainer(c)
        trainer.prepare()
        rollouts = trainer.roll_out([3, 5], [0, 1])
        assert [len(r.latents) for r in rollouts] == [size] * (8 // size)
        assert [m for r in rollouts for m in r.members] == list(range(8))
        made.append(torch.cat([r.latents for r in rollouts]))
    torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made[0], made[2], atol=1e-4, rtol=1e-4)


def update_gradients(trainer, keep, advantage, data=()):
    """The gradient that one update takes, with these advantages [3 groups, 4]; the weights stay."""
    taken = {}

    def step(*_):
        taken.update({name: p.grad.clone() for name, p in trainer.model.parameters.items()})

    rollouts = trainer.roll_out([0, 1, 2], [0, 1, 2])
    trainer.model.optimizer.step = step
    rollouts = scored(trainer, rollouts, advantage.flatten(), keep.flatten())
    trainer.update(rollouts, int(keep.sum()), list(data))
    return taken


def norm(gradients):
    return torch.cat([g.flatten() for g in gradients.values()]).norm()


@pytest.mark.parametrize("micro_batch", [12, 2], ids=["groups_together", "group_in_parts"])
def test_no_group_pulls_harder_than_its_limit(folders, tmp_path, micro_batch):
    options = {**NFT, "micro_batch": micro_batch, "grad_clip": 0.0, "nft_times": 2}
    advantage = torch.tensor([[1.0, -1.0, 2.0, -2.0], [0.1, -0.1, 0.1, -0.1], [3.0, 1.0, -4.0, 0.0]])
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[2, 3] = False
    made = {}
    for limit in (0.0, 1e6, 0.1):
        trainer = grpo.GRPOTrainer(toy(folders, tmp_path, **options, group_clip=limit))
        trainer.prepare()
        randomise(trainer)
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
def test_rows_of_the_data_add_their_supervised_gradient(folders, tmp_path, limit):
    options = {**NFT, "micro_batch": 4, "grad_clip": 0.0, "group_clip": limit}
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, **options, data_rows="5@3.0"))
    trainer.prepare()
    randomise(trainer)
    advantage = torch.tensor([[1.0, -1.0, 2.0, -2.0], [0.1, -0.1, 0.1, -0.1], [3.0, 1.0, -4.0, 0.0]])
    keep = torch.ones(3, 4, dtype=torch.bool)
    without = update_gradients(trainer, keep, advantage)
    added = update_gradients(trainer, keep, advantage, data=[7, 1, 4, 0, 9])
    batch = trainer.data.batches([7, 1, 4, 0, 9], [False] * 5)
    places = list(range(5))
    noise = row_noise(0, [grpo.DATA + place for place in places], batch["latents"].shape[1:])
    loss = 3 * trainer.task.row_losses(batch, noise, row_uniform(0, places, "data")).mean()
    alone = torch.autograd.grad(loss, list(trainer.model.parameters.values()))
    for (name, value), gradient in zip(added.items(), alone, strict=True):
        torch.testing.assert_close(value - without[name], gradient, atol=2e-5, rtol=1e-3)
    only = update_gradients(trainer, torch.zeros_like(keep), advantage, data=[7, 1, 4, 0, 9])
    for value, gradient in zip(only.values(), alone, strict=True):  # no group teaches: the data still do
        torch.testing.assert_close(value, gradient, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("task", ["kontext", "sd_inpaint"])
@pytest.mark.parametrize("micro_batch", [2, 8], ids=["group_in_parts", "groups_together"])
def test_samples_are_learnt_where_they_came_through_towards_their_groups_best(
    folders, tmp_path, task, micro_batch
):
    options = {"rollout_guidance": 1.0, "nft_times": 0, "contrastive_states": 2, "grad_clip": 0.0}
    options |= {**NFT, "nft_times": 0, "micro_batch": micro_batch, "rollout_steps": 4}
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, task, **options))
    trainer.prepare()
    randomise(trainer)
    advantage = torch.tensor([[0.2, -1.5, 0.5, 0.1], [0.0, 0.4, -0.4, 0.0], [9.0, 0.0, 0.0, 0.0]])
    keep = torch.tensor([[True] * 4, [True, True, True, False], [False] * 4])
    taken = update_gradients(trainer, keep, advantage)

    # By hand: a plain loop for each sample, its states, the errors towards the best's end and its own.
    best, pulls = [2, 1], [[0.3, 1.0, 0.0, 0.4], [0.4, 0.0, 0.8, 0.0]]
    sampling, total = RolloutSettings(4, 1.0), torch.zeros(())
    for row in range(2):
        batch = trainer.sampling_batch(trainer.data.batches, [row])
        paths, ends = [], []
        for member in range(4 * row, 4 * row + 4):
            noise = row_noise(0, [member], tuple(batch["latents"].shape[1:]))
            seen = []
            with torch.no_grad():
                end, _ = trainer.task.rollout(batch, noise, sampling, callback=seen.append)
            paths.append(seen)
            ends.append(end)
        for place, pull in enumerate(pulls[row]):
            for number in range(2):
                u = row_uniform(0, [4 * row + place], f"visited {number}")
                event = paths[place][1 + int(u * 3)]
                time = torch.as_tensor(event["sigma"] if task == "kontext" else event["t"]).reshape(1)
                prediction = trainer.task.predict(event["x"], time, batch, 1.0)
                if task == "kontext":
                    reached, share = event["x"] - time * prediction, float(time) ** 2
                else:
                    alpha = trainer.task.alpha_bar[int(time)]
                    reached = (event["x"] - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
                    share = float((1 - alpha) / alpha)
                towards, back = ((reached - ends[end]).square().mean() for end in (best[row], place))
                total = total + pull * (towards - back) / (share + 0.05) / 2
    alone = torch.autograd.grad(total / int(keep.sum()), list(trainer.model.parameters.values()))
    for (name, value), gradient in zip(taken.items(), alone, strict=True):
        torch.testing.assert_close(value, gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_samples_that_teach_nothing_are_left_out_of_a_pass():
    def piece(first, count):
        members = list(range(first, first + count))
        values = torch.tensor(members, dtype=torch.float32)[:, None]
        batch = {"latents": values * 10, "prompts": [str(m) for m in members]}
        return rollout.Rollout(members, batch, values, ())

    keep = torch.tensor([True, False, True, False, True])
    rollouts = rollout.with_advantages([piece(0, 3), piece(3, 2)], torch.arange(5.0), keep)
    made = rollout.kept_only(rollouts, micro_batch=2)
    assert [r.members for r in made] == [[0, 2], [4]]
    assert [r.advantage.tolist() for r in made] == [[0.0, 2.0], [4.0]] and all(r.keep.all() for r in made)
    assert made[0].batch["prompts"] == ["0", "2"]
    assert made[1].batch["latents"].tolist() == [[40.0]] and made[1].latents.tolist() == [[4.0]]
    none = rollout.with_advantages(rollouts, torch.zeros(5), torch.zeros(5, dtype=torch.bool))
    assert rollout.kept_only(none, micro_batch=2) == none[-1:]  # every process makes a pass


def test_guided_rollouts_of_sd_see_the_empty_prompt(folders, tmp_path):
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, "sd_inpaint", rollout_guidance=4.0))
    trainer.prepare()
    batch = trainer.sampling_batch(trainer.data.batches, [0, 3])
    x = torch.randn_like(batch["latents"])
    plain = {**batch, "tokens": batch["empty_tokens"]}
    with torch.no_grad():
        guided = trainer.task.predict(x, 500, batch, 4.0)
        positive = trainer.task.predict(x, 500, batch, 1.0)
        negative = trainer.task.predict(x, 500, plain, 1.0)
    torch.testing.assert_close(guided, negative + 4 * (positive - negative), atol=1e-5, rtol=1e-5)


def test_a_failing_reward_is_counted_and_never_zero(folders, tmp_path):
    grpo.GRPOTrainer(toy(folders, tmp_path, rewards=["toy_judge:one_fails"], max_steps=1)).run()
    entry = log(tmp_path)[0]
    assert entry["failed/toy_judge:one_fails"] == 1 and entry["kept"] == 7 / 8


@pytest.mark.parametrize("options, steps", [({"max_steps": 1}, 1), ({"max_steps": 9}, 3)])
def test_a_run_that_nobody_can_judge_ends_and_writes_no_lora(folders, tmp_path, options, steps):
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, rewards=["toy_judge:nothing"], **options))
    with pytest.raises(checkpoint.TrainingError, match=f"an image of the last {steps} updates.*toy_judge"):
        trainer.run()
    assert not list(tmp_path.glob("*.safetensors"))


def test_held_out_rows_that_nobody_can_judge_end_the_run_before_the_first_update(folders, tmp_path):
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, rewards=["toy_judge:nothing"], eval_rows=2))
    with pytest.raises(checkpoint.TrainingError, match="any of the 2 held-out images"):
        trainer.run()
    assert trainer.step == 0


def test_a_reward_with_nothing_to_judge_neither_hides_the_best_nor_stops_it(folders, tmp_path):
    """One that failed in some evaluations: each is compared by what judged both."""
    options = {"rewards": ["toy_judge:brightness", "toy_judge:nothing"], "eval_rows": 2, "eval_every": 1}
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, **options, max_steps=1))
    trainer.run()
    assert trainer.held_out.best is not None and len(trainer.held_out.history) == 2
    text = (tmp_path / "rewards.jsonl").read_text()
    assert "NaN" not in text and json.loads(text)["failed/toy_judge:nothing"] == 8


def pairs_without_masks(folder, count=4):
    folder.mkdir()
    for number in range(count):
        pixels = np.full((32, 32, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}_source.png")
        pixels[:16] = 255 - pixels[:16]
        Image.fromarray(pixels).save(folder / f"{number}_target.png")
        (folder / f"{number}.txt").write_text("make it red", encoding="utf-8")
    return f"pairs:{folder}"


@pytest.mark.parametrize("task", ["fill", "kontext"])
def test_pairs_without_masks_are_judged_outside_what_changed(folders, tmp_path, task):
    data = [pairs_without_masks(tmp_path / "pairs")]
    options = {"data": data, "rewards": ["keep_l1", "keep_ssim"], "eval_rows": 2, "max_steps": 1}
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path / "run", task, **options))
    trainer.run()
    row = trainer.scorer(trainer.data.batches).row(1)
    assert row.mask[:16].all() and not row.mask[16:].any()
    entry = log(tmp_path / "run")[0]
    assert -1 <= entry["reward/keep_ssim"] <= 1 and 0 < entry["reward/keep_l1"] <= 1
    assert trainer.held_out.best is not None


def test_what_may_change_is_unknown_without_masks_and_target_images(folders, tmp_path):
    folder = tmp_path / "pairs"
    pairs_without_masks(folder)
    for target in folder.glob("*_target.png"):
        target.unlink()
    options = {"data": [specs.edit_sources(folder)]}
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path / "run", rewards=["keep_l1"], **options))
    with pytest.raises(ValueError, match="reward keep_l1 needs masks, which the data has not"):
        trainer.prepare()
    assert trainer.task.module is None  # before the model is loaded


def test_a_mask_keeps_its_place_where_images_are_cropped_to_buckets(folders, tmp_path):
    """The row's mask at the same crop as its image: white where the image is white."""
    folder = tmp_path / "wide"
    folder.mkdir()
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[8:24, 40:72] = 255
    for name in ("source", "target", "mask"):
        Image.fromarray(pixels).save(folder / f"a_{name}.png")
    (folder / "a.txt").write_text("make it red", encoding="utf-8")
    options = {"data": [f"pairs:{folder}"], "sizing": "buckets", "bucket_step": 16}
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path / "run", **options))
    trainer.prepare()
    row = trainer.scorer(trainer.data.batches).row(0)
    assert row.mask.any() and ((row.target.mean(-1) > 0.5) == row.mask.bool()).float().mean() > 0.97
    assert torch.equal(row.source, row.target)


def test_text_is_kept_as_the_model_takes_it_and_once_for_a_row(folders, tmp_path):
    """In bfloat16 for such a model, with the prediction of float32 text; samples of one row share it."""
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, base_dtype="bfloat16", cache_dtype="bfloat16"))
    trainer.prepare()
    (made, *_) = trainer.roll_out([0], [0])
    tokens, pooled = made.batch["tokens"], made.batch["pooled"]
    assert tokens.dtype == pooled.dtype == torch.bfloat16 and made.batch["latents"].dtype == torch.float32
    assert len(tokens) == 2 and tokens.untyped_storage().nbytes() == tokens[0].numel() * 2
    step, wide = made.transitions[0], {**made.batch, "tokens": tokens.float(), "pooled": pooled.float()}
    with torch.no_grad():
        ours, theirs = (trainer.task.predict(step.x, step.time, b, 3.0) for b in (made.batch, wide))
    assert torch.equal(ours, theirs)


def test_a_scorer_forgets_rows_beyond_its_memory(folders, tmp_path, monkeypatch):
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path))
    trainer.prepare()
    scorer = scoring.RowScorer(trainer.rewards, trainer.data.batches)
    monkeypatch.setattr(scoring, "KEPT_BYTES", 3 * scorer.row(0).bytes)
    reads = []
    real = scoring.read_row
    monkeypatch.setattr(scoring, "read_row", lambda *a: reads.append(a[1]) or real(*a))
    for number in (0, 1, 2, 0, 3, 0, 1):
        scorer.row(number)
    assert reads == [1, 2, 3, 1] and len(scorer._rows) == 3


def test_scores_travel_in_types_that_every_device_knows(folders, tmp_path, monkeypatch):
    """MPS has no float64."""
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path, max_steps=1, eval_rows=1))
    trainer.prepare()
    seen, real = [], trainer.accelerator.gather
    monkeypatch.setattr(trainer.accelerator, "gather", lambda t: seen.append(t.dtype) or real(t))
    trainer.evaluate()
    trainer.train_step()
    assert seen and torch.float64 not in seen


def test_an_overflow_of_the_loss_scale_skips_a_step_and_a_broken_gradient_ends_the_run(
    folders, tmp_path, monkeypatch
):
    trainer = grpo.GRPOTrainer(toy(folders, tmp_path))
    trainer.prepare()
    scale = SimpleNamespace(get_scale=lambda: 32768.0)
    monkeypatch.setattr(trainer.accelerator, "scaler", scale)
    assert trainer._finite(torch.tensor(torch.inf), torch.zeros(())) == torch.inf
    scale.get_scale = lambda: 0.5
    for scaler in (scale, None):
        monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
        with pytest.raises(checkpoint.TrainingError, match="not finite at step 1"):
            trainer._finite(torch.tensor(torch.nan), torch.zeros(()))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_weights_are_refused_before_anything_is_loaded(folders, tmp_path, monkeypatch, kind):
    accelerator = SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind),
        process_index=0,
        num_processes=2,
        is_main_process=True,
        device="cpu",
    )
    started = processes.Processes(accelerator, sharded=True)
    monkeypatch.setattr(processes, "start", lambda c, logs: started)
    monkeypatch.setattr(resume, "find", lambda *facts: None)
    with pytest.raises(ValueError, match=f"reward training under {kind}.*launch it without"):
        grpo.GRPOTrainer(toy(folders, tmp_path / "run")).prepare()
    assert not (tmp_path / "run").exists()


def test_mistakes_are_one_sentence_before_anything_is_loaded(folders, tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        toy(folders, tmp_path, window_size=4)
    for options in ({}, {"algorithm": "nft", "rollout_steps": 1}):
        with pytest.raises(ValueError, match="contrastive_states is for algorithm nft"):
            toy(folders, tmp_path, contrastive_states=2, **({"window_size": 1} | options))
    with pytest.raises(ValueError, match="nft_times is 0: it may be 0 with contrastive_states only"):
        toy(folders, tmp_path, algorithm="nft", nft_times=0)
    for name, value in {"batch_size": 7, "accumulation": 2, "prompt_drop": 0.3}.items():
        with pytest.raises(ValueError, match=f"{name} is .*leave it out"):
            toy(folders, tmp_path, **{name: value})
    for name, instead in {
        "screen": "more rows",
        "data_states": "contrastive_states",
        "ratio_norm": "clip",
    }.items():
        with pytest.raises(ValueError, match=f"option {name} is gone: .*{instead}"):
            toy(folders, tmp_path, **{name: 1})
    with pytest.raises(ValueError, match="rewards is empty"):
        grpo.GRPOTrainer(toy(folders, tmp_path, rewards=[])).run()
    with pytest.raises(ValueError, match="NAME.KEY=VALUE"):
        grpo.GRPOTrainer(toy(folders, tmp_path, reward_options=["pickscore.path=x"])).run()
