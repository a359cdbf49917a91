"""Whole runs of the trainer on toy pipelines: resume after kill -9, two processes, NaN, every method."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from comfyui_diptych.models import tiny
from comfyui_diptych.training import trainer as sft
from comfyui_diptych.training.runtime import checkpoint
from safetensors.torch import load_file
from toys import train_config as toy
from toys import two_processes, write_recipe


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(c, **callbacks):
    trainer = sft.Trainer(c, **callbacks)
    return trainer, trainer.run()


KILLED = """
import os, signal, sys
from comfyui_diptych.training import recipes
from comfyui_diptych.training import trainer as sft
def die(report):
    if report.step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
c = recipes.load(sys.argv[1])
sft.Trainer(c, on_report=die).run()
"""


def test_20_steps_equal_9_then_kill_then_11_bit_for_bit(folders, tmp_path):
    options = {"max_steps": 20, "save_every": 9, "ema": 0.9, "accumulation": 2}
    cache = {"cache_dir": str(tmp_path / "cache")}
    straight, path = run(toy(folders, tmp_path / "straight", **options, **cache))
    broken = toy(folders, tmp_path / "broken", **options, **cache)
    recipe = write_recipe(broken, tmp_path / "broken.yaml")
    child = subprocess.run([sys.executable, "-c", KILLED, str(recipe)], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    kept = checkpoint.folders(tmp_path / "broken" / "checkpoints")
    assert [p.name for p in kept] == ["step_00000009"]
    broken.resume = "auto"
    resumed, again = run(broken)
    one, two = load_file(path), load_file(again)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    for name in ("trained.safetensors", "ema.safetensors"):
        values = [
            load_file(tmp_path / run / "checkpoints" / "step_00000020" / name)
            for run in ("straight", "broken")
        ]
        assert all(torch.equal(values[0][k], values[1][k]) for k in values[0])


# One launch for two runs, plain and sharded, since it takes longer than they do. accelerate offers FSDP on
# accelerators only: for the second run the child claims to be one, everything else is the real path.
PLAIN_THEN_SHARDED = """
import os, sys
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from comfyui_diptych.cli import main
end, Accelerator.end_training = Accelerator.end_training, lambda self: None
assert main(["train", sys.argv[1]]) == 0
Accelerator.end_training = end
AcceleratorState._reset_state()
GradientState._reset_state()
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "FluxTransformerBlock,FluxSingleTransformerBlock",
}
sys.exit(main(["train", sys.argv[2]]))
"""


# So does it for DeepSpeed, which has to find the two processes itself.
DEEPSPEED = """
import os, sys
from accelerate.state import DistributedType, PartialState
PartialState(cpu=True)
import deepspeed
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
PartialState._shared_state |= {"distributed_type": DistributedType.DEEPSPEED, "_cpu": False}
del os.environ["ACCELERATE_USE_CPU"]
from comfyui_diptych.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def zero(stage):
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "2",
    }


@pytest.fixture(scope="module")
def in_one_and_two(folders, tmp_path_factory):
    """The folder of one run with twice the batch, and of two runs of two processes."""
    root = tmp_path_factory.mktemp("in_one_and_two")
    cache = {"cache_dir": str(root / "cache")}
    run(toy(folders, root / "one", batch_size=4, **cache))
    recipes = [
        write_recipe(toy(folders, root / name, batch_size=2, **cache), root / f"{name}.yaml")
        for name in ("ddp", "fsdp")
    ]
    (root / "runs.py").write_text(PLAIN_THEN_SHARDED)
    two_processes(root / "runs.py", *recipes)
    return root


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_twice_the_batch(in_one_and_two, kind):
    one, two = (load_file(next((in_one_and_two / name).glob("*.safetensors"))) for name in ("one", kind))
    state = checkpoint.read_state(in_one_and_two / kind / "checkpoints/step_00000004")
    sharded = (in_one_and_two / kind / "checkpoints/step_00000004/engine").is_dir()
    assert state["world"] == 2 and sharded == (kind == "fsdp")
    moved = max(t.abs().max().item() for k, t in one.items() if "lora_B" in k)
    assert moved > 1e-3
    assert max((one[k] - two[k]).abs().max().item() for k in one) <= 1e-5


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_in_two_processes_equals_one_and_resumes(folders, tmp_path, stage):
    options = {"save_every": 2, "keep_last": 9, "cache_dir": str(tmp_path / "cache")}
    _, path = run(toy(folders, tmp_path / "one", batch_size=4, **options))
    recipe = write_recipe(toy(folders, tmp_path / "two", batch_size=2, **options), tmp_path / "two.yaml")
    script = tmp_path / "deepspeed_runs.py"
    script.write_text(DEEPSPEED)
    two_processes(script, recipe, environment=zero(stage))
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    for one, two in zip(*[[json.loads(line) for line in lines] for lines in logs], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    one, two = load_file(path), load_file(tmp_path / "two" / path.name)
    apart = torch.cat([(one[k] - two[k]).abs().flatten() for k in one])
    # Adam's first steps are as long where the gradient is nothing but rounding.
    assert (apart > 1e-5).float().mean() < 1e-3 and apart.mean() < 1e-6
    shutil.rmtree(tmp_path / "two/checkpoints/step_00000004")
    two_processes(script, recipe, "--resume", "auto", environment=zero(stage))
    again = load_file(tmp_path / "two" / path.name)
    assert all(torch.equal(two[k], again[k]) for k in two)


@pytest.mark.parametrize(
    ("task", "method", "options"),
    [
        ("fill", "moe_lora", {"ema": 0.9, "loss_on": "edited", "sample_every": 2, "sample_steps": 2}),
        ("fill", "lora", {"layout": "inpaint", "mask_variants": 2, "cache": False, "loss_on": "weighted:4"}),
        (
            "fill",
            "lora",
            {"base_dtype": "bfloat16", "mixed_precision": "bf16", "gradient_checkpointing": True},
        ),
        ("fill", "lora", {"base_dtype": "float8_e4m3fn", "mixed_precision": "bf16"}),
        ("fill", "full", {"init": "random", "train_text_encoder": True}),
        (
            "fill",
            "lora",
            {"data": ["shapes:24?size=32&task=base"], "edit_masks": True, "edit_loss_weight": 2.0},
        ),
        ("kontext", "lora", {"sample_every": 4, "sample_steps": 2, "loss_weighting": "cosmap"}),
        ("kontext", "full", {"prompt_drop": 1.0}),
        ("sd_inpaint", "lora", {"sample_every": 4, "sample_steps": 2, "train_text_encoder": True}),
        ("sd_inpaint", "full", {"mask_variants": 2}),
    ],
)
def test_every_family_and_method_trains_only_what_it_should(folders, tmp_path, task, method, options):
    if task == "sd_inpaint":
        options = {**options, "data": ["shapes:24?size=32&task=inpaint"]}
    trainer, path = run(toy(folders, tmp_path, task, method=method, **options))
    assert path.exists()
    base = load_file(next((folders / task / trainer.task.denoiser_part).glob("*.safetensors")))
    module = trainer.model.parts[trainer.task.denoiser_part]
    for name, parameter in module.named_parameters():
        name = name.replace(".base_layer", "")
        if not parameter.requires_grad:
            stored = base[name].to(trainer.task.dtype).to(parameter.dtype)
            assert torch.equal(parameter.data.float(), stored.float()), name
    trained = checkpoint.read_tensors(checkpoint.folders(tmp_path / "checkpoints")[-1], "trained.safetensors")
    assert all(t.dtype == torch.float32 for t in trained.values())
    if method != "full":
        assert all("lora_" in name for name in trained)
        assert any(t.abs().sum() > 0 for name, t in trained.items() if "lora_B" in name)
    else:
        assert (path / "model_index.json").is_file()
        assert any("text_encoder" in n for n in trained) == trainer.config.train_text_encoder
    if trainer.config.sample_every:
        assert list((tmp_path / "samples").glob("*.png"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_nan_stops_with_one_sentence_and_leaves_the_last_checkpoint(folders, tmp_path, monkeypatch):
    c = toy(folders, tmp_path, save_every=2)
    real = sft.row_noise

    def poisoned(seed, positions, shape, offset=0.0):
        return real(seed, positions, shape, offset) * (float("nan") if positions[0] >= 4 else 1)

    monkeypatch.setattr(sft, "row_noise", poisoned)
    with pytest.raises(checkpoint.TrainingError, match=r"nan.*step 3.*step_00000002 is intact"):
        run(c)
    saved = checkpoint.read_tensors(tmp_path / "checkpoints" / "step_00000002", "trained.safetensors")
    assert all(t.isfinite().all() for t in saved.values())


def test_merged_padding_and_the_whole_of_it_give_the_same_losses(tmp_path):
    """The bundled Fill, whose padding is all alike, with and without its 64 tokens of text."""
    losses = []
    for name, options in (("all", {}), ("merged", {"text_lengths": [64]})):
        c = toy(tiny.folder(), tmp_path / name, max_sequence_length=64, **options)
        run(c)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_drawn_guidance_and_the_edits_weight_reach_the_loss(tmp_path):
    """Both change the first loss, and the edit's weight is what the mask of the data says."""
    first = {}
    for name, options in (
        ("plain", {}),
        ("guidance", {"guidance_max": 60.0}),
        ("edit", {"edit_loss_weight": 9.0}),
    ):
        c = toy(tiny.folder(), tmp_path / name, max_steps=1, **options)
        trainer, _ = run(c)
        first[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text())["loss"]
        batch = trainer.data.batches([0, 1], [False, False])
        assert ("touched" in batch) == (name == "edit")
    assert len(set(first.values())) == 3
    source = trainer.data.batches.corpus.source
    for i, touched in enumerate(batch["touched"]):
        sample = source[trainer.data.batches.entries[i].index]
        pixels = touched.repeat_interleave(8, -1).repeat_interleave(8, -2)[0]
        assert torch.equal(pixels[:, 32:], sample.mask) and not pixels[:, :32].any()


def test_weights_are_saved_in_the_wanted_type(folders, tmp_path):
    _, path = run(toy(folders, tmp_path / "lora", save_dtype="bfloat16", max_steps=1))
    _, exact = run(toy(folders, tmp_path / "exact", max_steps=1))
    half, whole = load_file(path), load_file(exact)
    assert all(torch.equal(half[k], whole[k].bfloat16()) for k in whole)
    _, folder = run(toy(folders, tmp_path / "full", method="full", save_dtype="float16", max_steps=1))
    saved = load_file(next((folder / "transformer").glob("*.safetensors")))
    assert {t.dtype for t in saved.values()} == {torch.float16}
    assert "_name_or_path" not in json.loads((folder / "transformer" / "config.json").read_text())


def test_kontext_trains_on_from_fill_with_its_lora(folders, tmp_path):
    _, lora = run(toy(folders, tmp_path / "lora", max_steps=1))
    start = {"init_from": str(folders / "fill"), "fuse_loras": [str(lora)]}
    c = toy(folders, tmp_path / "kontext", "kontext", method="full", lr=0.0, max_steps=1, **start)
    _, folder = run(c)
    begun = load_file(next((folder / "transformer").glob("*.safetensors")))
    base = load_file(next((folders / "fill" / "transformer").glob("*.safetensors")))
    change = load_file(lora)
    for name, value in begun.items():
        stem = f"transformer.{name.removesuffix('.weight')}.lora_"
        expected = base[name]
        if f"{stem}A.weight" in change:
            expected = expected + change[f"{stem}B.weight"] @ change[f"{stem}A.weight"]
        if name == "x_embedder.weight":
            expected = expected[:, :64]
        assert torch.allclose(value, expected, atol=1e-6), name


@pytest.mark.parametrize(
    "start", [{"fuse_loras": ["gone.safetensors:0.5"]}, {"init_lora": "gone.safetensors"}]
)
def test_a_lora_that_is_not_there_is_told_before_anything_is_cached(folders, tmp_path, start):
    with pytest.raises(ValueError, match="gone.safetensors does not exist"):
        run(toy(folders, tmp_path, **start))
    assert not (tmp_path / "cache").exists()


def test_cached_and_uncached_training_see_the_same_batches(folders, tmp_path):
    _, cached = run(toy(folders, tmp_path / "cached"))
    _, live = run(toy(folders, tmp_path / "live", cache=False))
    one, two = load_file(cached), load_file(live)
    assert max((one[k] - two[k]).abs().max().item() for k in one) <= 1e-5


def test_being_stopped_saves_and_the_same_settings_resume(folders, tmp_path):
    c = toy(folders, tmp_path, resume="auto")
    seen = []
    trainer, path = run(c, on_report=seen.append, should_stop=lambda: len(seen) == 2)
    assert path.name == "step_00000002" and trainer.step == 2
    trainer, path = run(c, on_report=seen.append)
    assert [r.step for r in seen] == [1, 2, 3, 4] and path.suffix == ".safetensors"


def test_a_full_disk_during_a_run_keeps_the_last_checkpoint(folders, tmp_path, monkeypatch):
    real = torch.save

    def full(value, path, *args, **kwargs):
        if "00000004" in str(path):
            raise OSError(28, "No space left on device")
        return real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(checkpoint.TrainingError, match="No space left.*step_00000002 is intact"):
        run(toy(folders, tmp_path, save_every=2))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_full_disk_beside_the_checkpoints_is_one_sentence_too(folders, tmp_path, monkeypatch):
    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sft.Trainer, "_report", full)  # writes the loss log
    with pytest.raises(
        checkpoint.TrainingError, match="stopped at step 1 .*No space left.*step 1 is kept in"
    ):
        run(toy(folders, tmp_path))


def test_a_killed_cache_is_completed_not_redone(folders, tmp_path):
    c = toy(folders, tmp_path, max_steps=1)
    run(c)
    seen = {}

    def progress(items, label):
        seen[label] = len(items)
        return items

    sft.Trainer(c, progress=progress).prepare()
    assert seen == {"caching images": 0, "caching prompts": 0}
    shutil.rmtree(Path(tmp_path) / "cache" / "pictures")
    trainer = sft.Trainer(c, progress=progress)
    trainer.prepare()
    assert seen["caching images"] == 24


def test_an_interrupted_cache_keeps_every_finished_row_with_all_its_masks(folders, tmp_path):
    c = toy(folders, tmp_path, data=["shapes:12?size=32&task=inpaint"], mask_variants=3, encode_batch=4)

    def stop_after_seven(items, label):
        for count, item in enumerate(items):
            if count == 7:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        sft.Trainer(c, progress=stop_after_seven).prepare()
    left = []
    trainer = sft.Trainer(c, progress=lambda items, label: left.append(len(items)) or items)
    trainer.prepare()
    assert left[0] == 12 - 6  # 7 rows of 3 masks were begun, 5 batches of 4 encoded: 6 rows are whole
    assert len(trainer.data.batches.entries) == 36


def test_prior_preservation_makes_just_the_missing_class_images(folders, tmp_path):
    wanted = f"{tmp_path / 'class'}?prompt=a dog&count="
    options = {"class_images": f"{wanted}3"}
    options |= {"sample_steps": 2, "max_steps": 1, "data": ["shapes:4?size=32&task=inpaint"]}
    trainer, _ = run(toy(folders, tmp_path / "one", "sd_inpaint", **options))
    made = {p.name: p.read_bytes() for p in (tmp_path / "class").iterdir()}
    assert len(made) == 3
    batch, noise, _ = trainer._batch()
    assert batch["prior"].tolist() == [False, False, True, True] and len(noise) == 4
    assert batch["prompts"][2:] == ["a dog", "a dog"] or " " in batch["prompts"]
    assert not torch.equal(noise[:2], noise[2:])
    run(toy(folders, tmp_path / "two", "sd_inpaint", **{**options, "class_images": f"{wanted}4"}))
    after = {p.name: p.read_bytes() for p in (tmp_path / "class").iterdir()}
    assert len(after) == 4 and made.items() <= after.items()


@pytest.mark.parametrize("gate", ["softmax_all", "softmax_topk"])
def test_gradient_checkpointing_changes_no_gradient(folders, tmp_path, gate):
    gradients = []
    for on in (False, True):
        c = toy(folders, tmp_path, method="moe_lora", moe_gate=gate, gradient_checkpointing=on)
        trainer = sft.Trainer(c)
        trainer.prepare()
        for name, parameter in trainer.model.parameters.items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        trainer._loss(*trainer._batch()).backward()
        gradients.append({name: p.grad.clone() for name, p in trainer.model.parameters.items()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
        if "lora_route" in name:
            assert bool(gradient.abs().sum() > 0) == (gate == "softmax_all")


@pytest.mark.parametrize(
    ("task", "method"), [("fill", "lora"), ("fill", "moe_lora"), ("kontext", "lora"), ("sd_inpaint", "full")]
)
def test_a_few_images_are_learned(folders, tmp_path, task, method):
    data = ["shapes:2?size=32&task=inpaint"] if task == "sd_inpaint" else ["shapes:2?size=32"]
    options = {"data": data, "max_steps": 60, "batch_size": 8, "rank": 16, "lr": 1e-2, "prompt_drop": 0.0}
    options |= {"method": method, "save_every": 60}
    seen = []
    run(toy(folders, tmp_path, task, **options), on_report=lambda r: seen.append(r.loss))
    assert sum(seen[-10:]) < 0.7 * sum(seen[:10])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "kontext"}, "384 input channels"),
        ({"model": "nowhere/at/all"}, "does not exist"),
        ({"data": ["pairs:nowhere"]}, "nowhere does not exist"),
        ({"class_images": "folder?prompt=a dog"}, "leave it empty"),
        ({"target_modules": ["nothing"]}, "match no linear"),
        ({"optimizer": "adamw8bit"}, "bitsandbytes is not installed"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_trained(folders, tmp_path, options, words, monkeypatch):
    if "target_modules" not in options:  # only the model's own modules tell

        def load(self):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr("comfyui_diptych.training.tasks.base.Task.load_encoders", load)
    c = toy(folders, tmp_path)
    for name, value in options.items():
        setattr(c, name, value)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        sft.Trainer(c).run()


def test_a_run_whose_prompts_are_cached_never_loads_a_text_encoder(folders, tmp_path, monkeypatch):
    c = toy(folders, tmp_path / "one", cache_dir=str(tmp_path / "cache"), max_steps=1)
    run(c)
    shutil.copytree(folders / "fill", tmp_path / "moved")
    c.model = str(tmp_path / "moved")
    real = sft.make_task(c).load_text.__func__
    loaded = []
    monkeypatch.setattr(
        "comfyui_diptych.training.tasks.base.Task.load_text", lambda self: loaded.append(real(self))
    )
    run(c)
    assert not loaded
    config_file = tmp_path / "moved" / "text_encoder" / "config.json"
    config_file.write_text(config_file.read_text().replace("\n", " \n"))  # other files, another encoder
    run(c)
    assert loaded
