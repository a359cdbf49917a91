"""A model folder names parts of diffusers and transformers; it cannot make Python import anything else."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from comfyui_diptych import cli
from comfyui_diptych.models import model_index, tiny
from comfyui_diptych.models.flux import check_folder
from comfyui_diptych.training.tasks.base import component


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The tiny Fill folder without weights, and a module on the path that says when it is imported."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder() / "fill", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "evil_module.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    assert "evil_module" not in sys.modules and not (tmp_path / "ran").exists()


def name(folder, **entries):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    "entries, sentence",
    [
        ({"vae": ["evil_module", "Vae"]}, "names 'evil_module' for its vae"),
        ({"scheduler": ["os", "system"]}, "names 'os' for its scheduler"),
        ({"extra": ["evil_module", "X"]}, "names 'evil_module' for its extra"),
        ({"_class_name": ["evil_module", "Pipeline"]}, "brings a pipeline of its own"),
    ],
)
def test_no_other_library_is_imported(model, tmp_path, capsys, entries, sentence):
    name(model, **entries)
    with pytest.raises(ValueError, match=sentence):
        check_folder(model, "transformer", 384, "FLUX.1 Fill")
    out = str(tmp_path / "o.png")
    assert cli.main(["edit", "make it red", "--model", str(model), "-o", out]) == 2
    sets = ["--set", f"model={model}", "--set", "data=shapes:2", "--set", f"output_dir={tmp_path / 'run'}"]
    assert cli.main(["train", "icedit", *sets]) == 2
    assert capsys.readouterr().err.count(sentence) == 2


def test_code_in_a_part_of_the_folder_is_refused(model):
    shutil.copy(model.parent / "evil_module.py", model / "vae" / "diffusers.py")
    with pytest.raises(ValueError, match="vae/diffusers.py"):
        check_folder(model, "transformer", 384, "FLUX.1 Fill")


@pytest.mark.parametrize(
    "entry, sentence",
    [
        (["evil_module", "Vae"], "evil_module.Vae"),
        (["diffusers", "DiffusionPipeline"], "diffusers.DiffusionPipeline"),
        (["transformers", "pipeline"], "transformers.pipeline"),
        (["transformers", "no_such_thing"], "only models, schedulers and tokenizers"),
        ([None, None], "has no vae"),
        ("AutoencoderKL", "has no vae"),
    ],
)
def test_a_part_is_a_model_a_scheduler_or_a_tokenizer(model, entry, sentence):
    name(model, vae=entry)
    with pytest.raises(ValueError, match=sentence):
        component(str(model), "vae")


def test_a_safety_checker_of_stable_diffusion_is_no_stranger():
    index = {"_class_name": "X", "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    model_index.check(index | {"feature_extractor": [None, None], "requires_safety_checker": False}, "x")
