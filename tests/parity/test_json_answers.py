"""--json of every command on tiny models: one object on stdout, holding what docs/command-line.md says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.commands import values
from comfyui_diptych.models import checkpoints, lora, powerpaint, tiny
from comfyui_diptych.models.multimodal import GenerativeMultimodalModel, word_tokenizer
from PIL import Image
from safetensors.torch import save_file
from toys import reward_config, train_config, write_recipe

ROOT = Path(__file__).parents[2]
ENCODER = "text_model.embeddings.token_embedding."
DENOISER = "model.diffusion_model."


def documented() -> dict[str, set[str]]:
    """What the page says of each command; not what stands in brackets, nor behind a semicolon."""
    found = {}
    for line in (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| ((?:`[a-z -]+`(?:, )?)+) \| (.*) \|$", line):
            cell = re.sub(r"\([^)]*\)", "", match[2]).partition(";")[0]
            for command in re.findall(r"`([^`]+)`", match[1]):
                found[command] = set(re.findall(r"`(\w+)`", cell))
    return found


@pytest.fixture
def answer(capsys, tmp_path, monkeypatch):
    """A function that runs a command with --json and returns its result, which is as documented."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object, name: str = "", more: frozenset = frozenset()) -> dict:
        capsys.readouterr()
        assert cli.main([*map(str, words), "--json"]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        made = json.loads(out)
        assert (made["command"], made["exit_code"], made["error"]) == (words[0], 0, None)
        assert set(made["result"]) == documented()[name or words[0]] | more
        return made["result"]

    return run


def photo(path: Path, size=(64, 64)) -> Path:
    Image.effect_noise(size, 90).convert("RGB").save(path)
    return path


def test_every_command_is_documented():
    leaves = {parser.prog.partition(" ")[2] for parser in values.parsers(cli.build_parser())}
    parents = {leaf.rpartition(" ")[0] for leaf in leaves}
    assert leaves - parents == documented().keys()


def test_edit(answer):
    made = answer("edit", "make the circle red", "--steps", 2, "-o", "out.png")
    assert (
        made["image"] == "out.png" and Path(made["image"]).is_file() and Path(made["side_by_side"]).is_file()
    )
    words = ("edit", "--steps", 2, "--best-of", 2, "--seed", 5)  # the demo's own words, which can be judged
    best = answer(*words, more=frozenset({"candidates"}))
    assert [each["seed"] for each in best["candidates"]] == [5, 6]
    top = max(best["candidates"], key=lambda each: each["score"])
    assert best["seed"] == top["seed"]


def test_outpaint_and_inpaint(answer, tmp_path):
    image = photo(tmp_path / "photo.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    wide = answer("outpaint", image, "a circle", "--left", 16, "--steps", 2)
    assert (wide["width"], wide["height"]) == Image.open(wide["image"]).size == (80, 64)
    words = ("inpaint", image, "a circle", "--mask", "mask.png", "--engine", "sd_inpaint", "--steps", 2)
    assert answer(*words)["engine"] == "sd_inpaint"


def test_generate_and_caption(answer, tmp_path):
    words = word_tokenizer(["a", "red", "circle"])
    GenerativeMultimodalModel.from_preset("tiny", words).save_pretrained("model")
    made = answer("generate", "a circle", "--model", "model", "--count", 2, "--direct")
    assert len(made["images"]) == 2 and all(Path(file).is_file() for file in made["images"])
    said = answer("caption", *made["images"], "--model", "model", "--count", 3)
    assert [(each["image"], len(each["captions"])) for each in said["captions"]] == [
        (file, 3) for file in made["images"]
    ]


def test_train_and_its_report(answer, folders, tmp_path):
    config = train_config(
        folders, tmp_path / "run", max_steps=3, sample_every=2, sample_steps=1, sample_count=1
    )
    recipe = write_recipe(config, tmp_path / "mine.yaml")
    made = answer("train", recipe)
    assert lora.read(made["result"]).info.step == made["step"] == 3
    text = Path(made["report"]).read_text(encoding="utf-8")
    losses = re.search(r'aria-label="loss">(.*?)</svg>', text, re.S)[1]
    assert losses.count("<circle") == 3 and text.count("<img") == 2 and "finished" in text
    assert f"diptych train {recipe} --json --resume auto" in text
    report = answer("report", made["run"])
    assert (report["step"], report["steps"], report["result"]) == (3, 3, made["result"])


def test_a_training_that_is_stopped(folders, tmp_path, capsys, monkeypatch):
    from comfyui_diptych.training import trainer

    step = trainer.Trainer.train_step

    def stopped(self):
        import signal

        signal.raise_signal(signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "train_step", stopped)
    recipe = write_recipe(train_config(folders, tmp_path / "run", max_steps=3), tmp_path / "mine.yaml")
    assert cli.main(["train", str(recipe), "--json"]) == 143
    made = json.loads(capsys.readouterr().out)
    assert made["error"]["kind"] == "stopped" and made["exit_code"] == 143
    result = made["result"]
    assert set(result) == {"run", "step", "checkpoint", "command"} and result["step"] == 1
    assert Path(result["checkpoint"]).is_dir() and result["command"] in made["error"]["message"]
    assert "step 1 of 3, not finished" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_grpo(answer, folders, tmp_path):
    config = reward_config(folders, tmp_path / "run", max_steps=2)
    made = answer("grpo", write_recipe(config, tmp_path / "mine.yaml"))
    assert {Path(file).name for file in made["images"]} == {"rewards.png", "before_after.png"}
    text = Path(made["report"]).read_text(encoding="utf-8")
    assert "Before and after" in text
    rewards = re.search(r'aria-label="reward: toy_judge:brightness">(.*?)</svg>', text, re.S)[1]
    assert rewards.count("<circle") == 2


def test_precompute(answer, folders, tmp_path):
    options = ("--set", "resolution=32", "--set", "max_sequence_length=24")
    made = answer("precompute", "shapes:2?size=32", "--model", folders / "fill", "-o", "encoded", *options)
    assert len(json.loads(Path(made["index"]).read_text())) == 2


def test_score(answer):
    made = answer("score", "-n", 2, "--steps", 1, "-o", "score")
    assert made["images"] == 2 and made["figures"] == json.loads(Path(made["score"]).read_text())["figures"]
    assert "contact-sheet.png" in Path(made["report"]).read_text(encoding="utf-8")


def test_resize(answer):
    made = answer(
        "resize", tiny.folder() / "loras" / "icedit.safetensors", "--rank", 2, "-o", "small.safetensors"
    )
    assert Path(made["lora"]).is_file() and "kept" in made["note"]


def checkpoint(path: str, channels: int = 4) -> None:
    state = {f"{DENOISER}input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3)}
    state[f"{DENOISER}out.2.bias"] = torch.zeros(4)
    save_file(state | {"first_stage_model.quant_conv.weight": torch.zeros(8, 8, 1, 1)}, path)


def test_merge_inpaint_and_glid(answer):
    checkpoint("sd.safetensors")
    checkpoint("inpaint.safetensors", 9)
    words = ("--inpaint", "inpaint.safetensors", "--base", "sd.safetensors", "-o", "out.safetensors")
    assert answer("merge-inpaint", "sd.safetensors", *words)["checkpoint"] == "out.safetensors"
    parts = answer("glid", "split", "sd.safetensors", name="glid split")["files"]
    assert parts == ["diffusion.pt", "kl.pt"]
    merged = answer("glid", "merge", "sd.safetensors", "diffusion.pt", name="glid merge")["files"]
    assert checkpoints.read(Path(merged[0])).keys() == checkpoints.read(Path("sd.safetensors")).keys()


def test_powerpaint(answer):
    state = {f"{ENCODER}wrapped.weight": torch.zeros(20, 8)}
    state |= {f"{ENCODER}trainable_embeddings.{token}": torch.zeros(10, 8) for token in powerpaint.TOKENS}
    save_file(state, "encoder.safetensors")
    made = answer("powerpaint", "split", "encoder.safetensors", name="powerpaint split")
    assert len(made["embeddings"]) == 3 and made["text_encoder"] is None


def test_doctor(answer):
    made = answer("doctor")
    assert [section["title"] for section in made["sections"]][0] == "Python and libraries"
    assert all(set(each) == {"state", "what", "remedy"} for s in made["sections"] for each in s["findings"])
