"""Training of the multimodal model by the general trainer: stages, joint, killed and resumed, exported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.models import multimodal as mm
from comfyui_diptych.models.image_files import to_pil
from comfyui_diptych.training import recipes
from comfyui_diptych.training.data.sources import open_source
from comfyui_diptych.training.tasks.multimodal import part, parts
from comfyui_diptych.training.tiny.text import words
from comfyui_diptych.training.trainer import Trainer
from PIL import Image
from safetensors.torch import load_file
from toys import write_recipe

STEPS = 20
OPTIONS = {
    "resolution": 28,
    "data": ["shapes:8?size=28&task=single"],
    "sample_data": [],
    "batch_size": 4,
    "align_steps": STEPS,
    "max_steps": STEPS,
    "align_lr": 5e-3,
    "lr": 5e-3,
    "lr_warmup": 0,
    "ema": 0.8,
    "save_dtype": "float32",
    "save_every": 7,
    "keep_last": 9,
    "sample_every": STEPS,
    "sample_count": 2,
    "sample_steps": 3,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model of a few thousand weights, with the words of the shapes world."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    architecture = mm.Architecture(
        image_size=28,
        embed_dim=32,
        latent_channels=4,
        encoder_widths=(8, 16),
        decoder_widths=(16, 8),
        unet={"widths": (16, 16, 32), "time_width": 32},
        bert={**small, "hidden_dropout_prob": 0.1},  # so that a frozen encoder in training mode would show
        gpt2={"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48},
        prefix_tokens=2,
        max_tokens=32,
    )
    torch.manual_seed(0)
    model = mm.GenerativeMultimodalModel(architecture, mm.word_tokenizer(words()))
    return model.save_pretrained(tmp_path_factory.mktemp("untrained") / "model")


def config(folder, output, **options):
    values = recipes.read("multimodal_tiny")
    values |= {"model": str(folder), "output_dir": str(output), **OPTIONS}
    return recipes.from_dict({**values, **options})


def train(c, **callbacks):
    for run in c.runs():
        trainer = Trainer(run, **callbacks)
        path = trainer.run()
    return trainer, path


def log(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def mean(lines, name):
    return sum(line[name] for line in lines) / len(lines)


@pytest.fixture(scope="module")
def both(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("both")
    return train(config(folder, output))


def test_both_stages_learn_and_leave_a_curve_and_sheets(both):
    trainer, path = both
    assert path == trainer.output / "model"
    stages = {
        "align": ("contrastive", "reconstruction", "caption"),
        ".": ("diffusion",),
    }
    for place, names in stages.items():
        lines = log(trainer.output / place)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        for name in names:
            assert mean(lines[-6:], name) < 0.9 * mean(lines[:6], name), name
        weights = {"reconstruction": trainer.config.reconstruction_weight}
        assert lines[3]["loss"] == pytest.approx(
            sum(weights.get(n, 1.0) * lines[3][n] for n in names), rel=1e-5
        )
        assert (trainer.output / place / "samples" / f"step_{STEPS:08d}.png").is_file()


def test_the_second_stage_changes_the_diffusion_alone_on_normalised_latents(both):
    trainer, path = both
    first, last = (load_file(p / "model.safetensors") for p in (trainer.output / "align/model", path))
    changed = {name for name in last if not torch.equal(first[name], last[name])}
    assert changed and all(name.startswith("latent_diffusion.") for name in changed)
    assert not any(name.endswith(("latent_mean", "latent_std")) for name in changed)
    check_normalised(path)


def check_normalised(path):
    """The statistics in a folder are those of its own latents of the whole data."""
    model = mm.GenerativeMultimodalModel.from_pretrained(path)
    source = open_source(OPTIONS["data"])
    seen = torch.stack([source[i].target for i in range(8)]).mul(255).round() / 255
    latents = model.image_decoder.get_latent_from_embedding(model.encode_image(seen))
    std, centre = torch.std_mean(model.latent_diffusion.normalise(latents), dim=(0, 2, 3), correction=0)
    assert centre.abs().max() < 1e-4 and (std - 1).abs().max() < 1e-4


@pytest.mark.parametrize("place", ["align", "."])
def test_what_is_exported_is_the_average(both, place):
    output = both[0].output / place
    exported = load_file(output / "model/model.safetensors")
    kept = output / f"checkpoints/step_{STEPS:08d}"
    averages, last = (load_file(kept / f"{name}.safetensors") for name in ("ema", "trained"))
    assert len(averages) > 20
    for name, value in averages.items():
        assert torch.equal(exported[name.removeprefix("./")], value), name
    assert any(not torch.equal(averages[name], last[name]) for name in averages)


KILLED = """
import os, signal, sys
from comfyui_diptych.training import recipes
from comfyui_diptych.training.trainer import Trainer
def die(report):
    if report.step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
for run in recipes.load(sys.argv[1]).runs():
    Trainer(run, on_report=die).run()
"""


def test_killed_in_the_first_and_stopped_in_the_second_stage_it_ends_bit_equal(both, folder, tmp_path):
    c = config(folder, tmp_path / "broken")
    recipe = write_recipe(c, tmp_path / "broken.yaml")
    child = subprocess.run([sys.executable, "-c", KILLED, str(recipe)], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    c.resume = "auto"
    seen = []
    stopped, path = train(
        c, on_step=seen.append, should_stop=lambda: len(seen) == STEPS - 7 + 10 and seen[-1] == 10
    )
    assert seen == [*range(8, STEPS + 1), *range(1, 11)] and path.name == "step_00000010"
    resumed, path = train(c)
    for place in ("align/model", "model"):
        straight, again = (load_file(t.output / place / "model.safetensors") for t in (both[0], resumed))
        assert straight.keys() == again.keys() and all(torch.equal(straight[k], again[k]) for k in again)


def test_joint_has_all_losses_and_resumes_bit_equal(folder, tmp_path):
    straight, path = train(config(folder, tmp_path / "straight", joint=True))
    lines = log(straight.output)
    for name in ("contrastive", "reconstruction", "caption"):
        assert mean(lines[-6:], name) < mean(lines[:6], name), name
    assert all(0 < line["diffusion"] < 2 for line in lines)
    check_normalised(path)
    seen = []
    c = config(folder, tmp_path / "broken", joint=True, resume="auto")
    train(c, on_step=seen.append, should_stop=lambda: seen[-1:] == [9])
    stopped = load_file(tmp_path / "broken/checkpoints/step_00000009/task.safetensors")
    assert stopped.keys() == {"latent_mean", "latent_std"} and stopped["latent_mean"].any()
    _, again = train(c)
    one, two = (load_file(p / "model.safetensors") for p in (path, again))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_preset_begins_with_the_words_of_a_file_and_is_saved_in_float16(tmp_path):
    (tmp_path / "words.txt").write_text("A small red circle.\nBig, blue!", encoding="utf-8")
    options = {
        "words": str(tmp_path / "words.txt"),
        "resolution": 56,
        "data": ["shapes:4?size=56&task=single"],
    }
    options |= {"align_steps": 1, "max_steps": 1, "sample_every": 0, "save_dtype": "float16"}
    _, path = train(config("tiny", tmp_path / "run", **options))
    assert {v.dtype for v in load_file(path / "model.safetensors").values()} == {torch.float16}
    model = mm.GenerativeMultimodalModel.from_pretrained(path)
    assert model.tokenizer.decode(
        model.tokenizer("a big blue circle", add_special_tokens=False).input_ids
    ) == ("a big blue circle")
    assert model.tokenizer.unk_token_id in model.tokenizer("green").input_ids


def test_dropped_texts_become_the_null_vector_and_captions_stay(folder, tmp_path):
    c = config(folder, tmp_path / "all", joint=True, prompt_drop=1.0, max_steps=2, sample_every=0)
    trainer = Trainer(c)
    trainer.prepare()
    batch, noise, u = trainer._batch()
    assert batch["dropped"].all() and all(len(prompt) > 10 for prompt in batch["prompts"])
    trainer.task.row_losses(batch, noise, u).mean().backward()
    null = trainer.task.module.latent_diffusion.null_condition
    assert null.grad.abs().sum() > 0
    c = config(folder, tmp_path / "none", joint=True, prompt_drop=0.0, max_steps=2, sample_every=0)
    trainer = Trainer(c)
    trainer.prepare()
    trainer.task.row_losses(*trainer._batch()).mean().backward()
    assert not trainer.task.module.latent_diffusion.null_condition.grad.any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stage": "diffuse", "model": "tiny", "resolution": 56}, "diffuse needs a folder that align wrote"),
        ({"stage": "align", "resolution": 56}, "resolution is 56 but the model's 28"),
        (
            {"stage": "align", "model": "tiny", "resolution": 56, "words": "nofile"},
            "words is 'nofile', no file",
        ),
        ({"joint": True, "stage": "align"}, "joint: true, which has no stages"),
        ({"method": "lora"}, "trained in full"),
        ({"sizing": "buckets"}, "sizing crop"),
        ({"class_images": "a?prompt=b"}, "class_images is not for multimodal"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, said, folder, tmp_path):
    with pytest.raises(ValueError, match=said):
        for run in config(folder, tmp_path, **options).runs():
            Trainer(run).prepare()


def test_a_run_of_both_stages_is_refused_by_one_trainer(folder, tmp_path):
    with pytest.raises(ValueError, match="two runs"):
        Trainer(config(folder, tmp_path)).prepare()


def test_a_checkpoint_of_either_stage_can_be_gone_on_from(folder, tmp_path):
    def runs(resume):
        return [(r.stage, r.resume) for r in config(folder, tmp_path, resume=resume).runs()]

    first, second = str(tmp_path / "align/checkpoints/step_1"), str(tmp_path / "checkpoints/step_1")
    assert runs("auto") == [("align", "auto"), ("diffuse", "auto")]
    assert runs(first) == [("align", first), ("diffuse", "")]
    assert runs(second) == [("diffuse", second)]


def captions_of(spec, folder, output):
    trainer = Trainer(config(folder, output, joint=True, data=[spec], sample_every=0))
    trainer.prepare()
    batches = trainer.data.batches
    count = len(batches.entries)
    batch = batches(list(range(count)), [False] * count)
    return batch["prompts"], batch["pixels"]


def test_every_source_gives_captions_and_the_middle_square(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    wide = torch.zeros(28, 56, 3)
    wide[:, 14:42, 0] = 1  # the middle is red
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    to_pil(wide).save(pictures / "a.png")
    (pictures / "a.txt").write_text("a red square", encoding="utf-8")
    line = {"prompt": "a red square", "image": "a.png"}
    (pictures / "data.jsonl").write_text(json.dumps(line), encoding="utf-8")
    row = {"image": {"bytes": (pictures / "a.png").read_bytes(), "path": None}, "text": ["a red square"]}
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "train-00000-of-00001.parquet")
    specs = (f"images:{pictures}", f"jsonl:{pictures}/data.jsonl", f"captions:{tmp_path}/*.parquet")
    for number, spec in enumerate(specs):
        prompts, pixels = captions_of(spec, folder, tmp_path / f"run{number}")
        assert prompts == ["a red square"] and pixels.shape == (1, 3, 28, 28)
        assert (pixels[:, 0] == 255).all() and not pixels[:, 1:].any()
    prompts, _ = captions_of("shapes:3?size=28", folder, tmp_path / "edits")  # of edits the result's caption
    assert all(" background with " in prompt for prompt in prompts)


def test_the_shell_generates_and_captions_as_the_model_does(both, tmp_path, capsys):
    path, prompt = both[1], "a red background with a small blue circle at the top left"
    out = tmp_path / "out.png"
    options = ["--steps", "4", "--seed", "3", "--count", "2"]
    assert cli.main(["generate", prompt, "--model", str(path), "-o", str(out), *options]) == 0
    files = capsys.readouterr().out.split()
    assert files == [str(tmp_path / f"out_{n}.png") for n in (1, 2)]
    model = mm.GenerativeMultimodalModel.from_pretrained(path)
    made = model.generate_from_text([prompt], 2, True, 4, 3)
    read = [torch.from_numpy(np.array(Image.open(file))) for file in files]
    assert all(torch.equal(r, m.mul(255).round().to(torch.uint8)) for r, m in zip(read, made, strict=True))
    assert cli.main(["caption", *files, "--model", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    captions = [model.generate_text_from_image(model.encode_image(r[None].float() / 255))[0] for r in read]
    assert said == [f"{file}: {caption}" for file, caption in zip(files, captions, strict=True)]
    assert cli.main(["generate", prompt, "--model", str(path), "-o", str(out), "--direct"]) == 0
    assert out.is_file()


@pytest.mark.parametrize("command", [["generate", "a circle"], ["caption", "image.png"]])
def test_without_the_bundled_model_the_shell_says_so(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIPTYCH_TINY_FOLDER", str(tmp_path))
    assert cli.main(command) != 0
    assert "tiny multimodal model is missing" in capsys.readouterr().err


def test_the_text_encoder_reads_parts_of_captions_and_the_decoder_learns_them_whole(folder, tmp_path):
    trainer, _ = train(config(folder, tmp_path / "run", stage="align", prompt_part=0.5, max_steps=1))
    task, caption = trainer.task, "a white background with a small red circle at the top left"
    short = {
        "a white background",
        "a small red circle",
        "the top left",
        "a white background with a small red circle",
        "a small red circle at the top left",
    }
    drawn = [part(caption, at) for at in task.draw(0, list(range(4000)))["part"].tolist()]
    assert set(drawn) == short | {caption}
    counts = {text: drawn.count(text) / 4000 for text in short}
    assert all(abs(share - 0.1) < 0.02 for share in counts.values()), counts

    pairs = task.module.pairs(torch.rand(1, 28, 28, 3), [caption], prompts=["a small red circle"])
    whole = task.module.pairs(torch.rand(1, 28, 28, 3), [caption])
    assert torch.equal(pairs.caption_ids, whole.caption_ids)
    fewer = len(caption.split()) - len("a small red circle".split())
    assert int(whole.attention_mask.sum()) - int(pairs.attention_mask.sum()) == fewer


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a circle", []),
        ("", []),
        ("with a circle", []),
        ("Two cats, and a dog.", ["Two cats", "a dog"]),
        ("a cup of tea on", ["a cup", "tea on"]),
    ],
)
def test_parts_of_a_caption_are_whole_phrases(text, found):
    assert parts(text) == found
