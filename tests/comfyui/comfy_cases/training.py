"""Training and scoring from the graph: a file in the loras folder, resumable, and ComfyUI left as it was."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import torch

from . import case
from .two_hosts import random_image


def train(host, name: str, **widgets):
    defaults = {
        "dataset": "shapes demo (512 pairs)",
        "base_model": "tiny fill (bundled)",
        "steps": 2,
        "output_name": name,
        "rank": 2,
        "batch_size": 1,
        "preview_every": 0,
    }
    graph = host.graph()
    node = graph.add("DiptychTrainLora", **(defaults | widgets))
    return graph.keep(name=node[0], curve=node[1], samples=node[2], report=node[3])


def pairs(host, folder: str, count: int = 3) -> None:
    """A dataset in ComfyUI's input folder."""
    import folder_paths
    from PIL import Image

    top = Path(folder_paths.get_input_directory()) / folder
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir(parents=True)
    for number in range(count):
        for role in ("source", "target"):
            Image.new("RGB", (64, 64), (number * 40, 90, 200)).save(top / f"{number}_{role}.png")
        (top / f"{number}.txt").write_text("make the background blue", encoding="utf-8")


def loras() -> Path:
    import folder_paths

    return Path(folder_paths.get_folder_paths("loras")[0])


@case
def a_folder_of_pairs_becomes_a_lora_that_core_loads(host):
    from safetensors import safe_open

    pairs(host, "three_pairs")
    kept = host.run(train(host, "from_pairs", dataset="three_pairs", preview_every=1)).kept
    file = loras() / kept["name"]
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["diptych"])
    assert header["recipe"] == "icedit" and header["step"] == 2
    assert kept["curve"].ndim == kept["samples"].ndim == 4 and "2 of 2 steps" in kept["report"]
    graph = host.graph()
    loader = graph.add("DiptychTinyModelLoader", which="fill")
    loaded = graph.add("LoraLoaderModelOnly", model=loader[0], lora_name=kept["name"], strength_model=1.0)
    model = host.run(graph.keep(model=loaded[0])).kept["model"]
    assert len(model.patches) > 10


@case
def an_interrupt_saves_a_checkpoint_and_the_same_settings_go_on(host):
    import comfy.model_management
    import comfy.utils

    seen: list[tuple[int, bool]] = []

    def press_stop(value, total, preview, **_):
        comfy.model_management.throw_exception_if_processing_interrupted()
        if total == 4:
            seen.append((value, preview is not None))
            if value == 2:
                comfy.model_management.interrupt_current_processing()

    told: list[str] = []
    console = logging.Handler()
    console.emit = lambda record: told.append(record.getMessage())
    level = logging.getLogger().level
    logging.getLogger().addHandler(console)
    logging.getLogger().setLevel(logging.INFO)
    comfy.utils.set_progress_bar_global_hook(press_stop)
    try:
        run = host.run(train(host, "stopped", steps=4, training_seed=5), may_fail=True)
    finally:
        logging.getLogger().removeHandler(console)
        logging.getLogger().setLevel(level)
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
    assert run.message("execution_interrupted"), run.error
    assert seen and all(shown for _, shown in seen) and not (loras() / "stopped.safetensors").exists()
    report = next(text for text in told if "to go on, run the node again with the same settings" in text)
    assert Path(report.partition("checkpoint: ")[2].partition("\n")[0], "state.json").is_file()
    stopped = [value for value, _ in seen][-1]
    seen.clear()
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, **_: seen.append((value, True)) if total == 4 else None
    )
    try:
        kept = host.run(train(host, "stopped", steps=4, training_seed=5)).kept
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert [value for value, _ in seen] == list(range(stopped + 1, 5))
    assert (loras() / kept["name"]).is_file()


@case
def training_leaves_comfyui_as_it_was(host):
    import os

    import comfy.model_management as memory

    graph = host.graph()
    loader = graph.add("DiptychTinyModelLoader", which="kontext")
    model = host.run(graph.keep(model=loader[0])).kept["model"]
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    memory.load_models_gpu([model])
    random, environment = torch.get_rng_state(), dict(os.environ)
    host.run(train(host, "kontext", base_model="tiny kontext (bundled)"))
    assert torch.equal(torch.get_rng_state(), random) and dict(os.environ) == environment
    assert memory.loaded_models() == []
    after = model.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@case
def a_folder_without_pairs_fails_with_one_sentence(host):
    import folder_paths

    (Path(folder_paths.get_input_directory()) / "nothing_here").mkdir(exist_ok=True)
    run = host.run(train(host, "x", dataset="nothing_here"), may_fail=True)
    assert "NAME_source.png" in run.error and "\n" not in run.error.strip()


@case
def a_score_of_the_expected_image_is_a_success(host):
    graph = host.graph()
    demo = graph.add("DiptychDemoImage", example=3)
    batches = {"edited": demo[3], "source": demo[0], "instruction": demo[1], "mask": demo[2]}
    node = graph.add("DiptychEditScore", **batches)
    photo = graph.given(random_image(1, 48, 32))
    other = graph.add("DiptychEditScore", edited=photo, source=photo)
    kept = host.run(graph.keep(kept=node[0], success=node[3], sheet=node[5], unknown=other[3])).kept
    assert kept["kept"] == 1 and kept["success"] == 1 and kept["unknown"] == -1 and kept["sheet"].ndim == 4


def reinforce(host, name: str, **widgets):
    """Two updates of the smallest reward training there is."""
    pairs(host, "reward_pairs", 2)
    defaults = {"updates": 2, "output_name": name, "preset": "fast", "start_from": "none"}
    defaults["dataset"] = "reward_pairs"
    small = {"rank": 2, "group_size": 2, "groups": 1, "preview_every": 1, "save_every": 1}
    graph = host.graph()
    if "reward" not in widgets:
        widgets["reward"] = graph.add("DiptychReward", name="jpeg_size")[0]
    node = graph.add("DiptychTrainGRPO", **(defaults | small | widgets))
    return graph.keep(name=node[0], curve=node[1], sheet=node[2], report=node[3])


@case
def reward_training_leaves_a_lora_that_says_how_it_came_about(host):
    from safetensors import safe_open

    kept = host.run(reinforce(host, "rewarded", preset="flow-grpo")).kept
    with safe_open(loras() / kept["name"], "pt") as opened:
        header = json.loads(opened.metadata()["diptych"])
    assert header["algorithm"] == "grpo" and header["reward"] == "jpeg_size x 1" and header["step"] == 2
    assert kept["curve"].ndim == kept["sheet"].ndim == 4 and "2 of 2 updates" in kept["report"]
    graph = host.graph()
    tiny = graph.add("DiptychTinyModelLoader", which="fill")
    loaded = graph.add("DiptychGRPOLoraLoader", model=tiny[0], lora=kept["name"], strength=1.0)
    report = host.run(graph.keep(report=loaded[1])).kept["report"]
    assert "grpo" in report and "jpeg_size" in report


@case
def a_batch_of_images_and_instructions_is_enough_to_learn_from(host):
    graph = host.graph()
    reward = graph.add("DiptychReward", name="shapes")[0]
    demo = graph.add("DiptychDemoImage", example=3)
    node = graph.add(
        "DiptychTrainGRPO",
        reward=reward,
        images=demo[0],
        instructions=demo[1],
        base_model="tiny kontext (bundled)",
        updates=1,
        output_name="from_batch",
        preset="nft",
        group_size=2,
        groups=1,
        rank=2,
        preview_every=0,
    )
    kept = host.run(graph.keep(name=node[0], report=node[3])).kept
    assert (loras() / kept["name"]).is_file() and "grpo_nft (nft)" in kept["report"]


@case
def a_stopped_reward_training_goes_on_where_it_was(host):
    import comfy.model_management
    import comfy.utils

    seen: list[int] = []

    def press_stop(value, total, preview, **_):
        comfy.model_management.throw_exception_if_processing_interrupted()
        if total == 3 and preview is not None:
            seen.append(value)
            if value == 1:
                comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(press_stop)
    try:
        run = host.run(reinforce(host, "stopped_reward", updates=3), may_fail=True)
        comfy.model_management.interrupt_current_processing(False)
        assert run.message("execution_interrupted"), run.error
        assert seen and not (loras() / "stopped_reward.safetensors").exists()
        kept = host.run(reinforce(host, "stopped_reward", updates=3)).kept
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)
    assert "3 of 3 updates" in kept["report"] and (loras() / kept["name"]).is_file()
