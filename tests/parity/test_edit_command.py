"""`diptych edit` from an image on disk to two images on disk, on tiny random models."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.commands import images
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def tiny_folder(fill_pipeline, kontext_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    fill_pipeline.save_pretrained(folder / "fill")
    kontext_pipeline.save_pretrained(folder / "kontext")
    generator = torch.Generator().manual_seed(0)
    path = "transformer.transformer_blocks.0.attn.to_q"
    factors = {
        f"{path}.lora_A.weight": torch.randn(4, 48, generator=generator),
        f"{path}.lora_B.weight": torch.randn(48, 4, generator=generator),
    }
    (folder / "loras").mkdir()
    save_file(factors, folder / "loras" / "editor.safetensors")
    card = {
        "trained": False,
        "panel": 64,
        "steps": 2,
        "guidance": {"fill": 30.0},
        "default_loras": {"fill": ["editor.safetensors"]},
    }
    (folder / "card.json").write_text(json.dumps(card))
    return folder


@pytest.fixture
def edit(tiny_folder, tmp_path, monkeypatch):
    """Run `diptych edit` with a model folder as the bundled one; returns the image it wrote."""
    monkeypatch.setenv("DIPTYCH_TINY_FOLDER", str(tiny_folder))

    def run(*words: str, name: str = "out.png") -> torch.Tensor:
        assert cli.main(["edit", *map(str, words), "-o", str(tmp_path / name)]) == 0
        return images.load_image(tmp_path / name)

    return run


@pytest.fixture
def photo(tmp_path, random_image):
    path = tmp_path / "photo.png"
    images.to_pil(random_image(1, 48, 80)[0]).save(path)
    return path


def test_without_arguments_the_demo_image_is_edited(edit, tmp_path, capsys):
    assert edit().shape == (1, 64, 64, 3)
    assert Image.open(tmp_path / "out_side_by_side.png").width > 2 * 256
    said = capsys.readouterr().out
    assert "UNTRAINED" in said
    assert "editor.safetensors: " in said and "loaded 1 modules" in said


@pytest.mark.parametrize("engine", ["fill", "kontext"])
@pytest.mark.parametrize("rule", ["ode", "flow"])
def test_the_result_has_the_source_size_and_follows_the_seed(edit, photo, engine, rule):
    words = (photo, "make the sky red", "--engine", engine, "--rule", rule, "--steps", "3")
    first, again, other = edit(*words), edit(*words), edit(*words, "--seed", "1")
    assert first.shape == (1, 48, 80, 3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_lora_strength_is_read_from_its_name_or_option(edit, photo, tiny_folder):
    lora = tiny_folder / "loras" / "editor.safetensors"
    words = (photo, "make the sky red")
    default, full = edit(*words), edit(*words, "--lora", lora)
    off, also_off = edit(*words, "--lora", f"{lora}:0"), edit(*words, "--lora", lora, "--lora-strength", "0")
    assert torch.equal(default, full)
    assert torch.equal(off, also_off)
    assert not torch.equal(off, full)


def test_a_mask_keeps_the_rest_of_the_image(edit, photo, tmp_path):
    mask = Image.new("L", (80, 48))
    mask.paste(255, (0, 0, 40, 48))
    mask.save(tmp_path / "mask.png")
    edited, source = edit(photo, "make it red", "--mask", tmp_path / "mask.png"), images.load_image(photo)
    assert torch.equal(edited[:, :, 40:], source[:, :, 40:])
    assert not torch.equal(edited[:, :, :40], source[:, :, :40])


def test_transparency_survives_the_edit(edit, tmp_path):
    clear = Image.new("RGBA", (64, 64), (200, 30, 30, 90))
    clear.save(tmp_path / "clear.png")
    edited = edit(
        tmp_path / "clear.png", "make it blue", "--engine", "kontext", "--reference", tmp_path / "clear.png"
    )
    assert edited.shape == (1, 64, 64, 4)
    assert torch.equal(edited[..., 3], images.load_image(tmp_path / "clear.png")[..., 3])


def test_a_negative_prompt_and_its_scale_work_together(edit, photo, capsys):
    words = ("edit", str(photo), "make it red", "--engine", "kontext", "--negative", "blue")
    assert cli.main([*words]) == 2
    assert "--negative does nothing at --cfg 1" in capsys.readouterr().err
    guided, plain = edit(*words[1:], "--cfg", "3"), edit(*words[1:5])
    assert not torch.equal(guided, plain)


def test_a_damaged_folder_is_one_sentence(photo, tiny_folder, tmp_path, capsys):
    shutil.copytree(tiny_folder / "fill", tmp_path / "damaged")
    (tmp_path / "damaged" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert cli.main(["edit", str(photo), "x", "--model", str(tmp_path / "damaged")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "damaged cannot be loaded (" in error and error.endswith("see diptych doctor")


@pytest.mark.parametrize("engine", ["fill", "kontext"])
def test_the_best_of_several_starts_is_the_edit_of_its_own_seed(edit, photo, capsys, engine):
    words = (photo, "make the sky red", "--engine", engine, "--steps", "4", "--rule", "flow")
    best = edit(*words, "--best-of", "3", "--judge", "jpeg_size", "--judge-steps", "2", "--seed", "7")
    said = capsys.readouterr().out
    kept = int(said.split("; kept ")[1].split()[0])
    assert "seeds 7 to 9" in said and "8 model evaluations: 3 candidates x 2 steps + 1 x 2" in said
    plain = edit(*words, "--seed", str(kept))
    torch.testing.assert_close(best, plain, rtol=0, atol=1.5 / 255)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--judge", "jpeg_size"), "--judge does nothing without --best-of"),
        (("--best-of", "2", "--judge", "keep_l1"), "reward keep_l1 needs masks"),
        (("--best-of", "2", "--judge", "jpeg_size", "--judge-steps", "9"), "does not fit a schedule of 2"),
        (("--best-of", "2", "--judge", "os:system"), "reward 'os' is not known"),
    ],
)
def test_a_judge_that_does_not_fit_is_one_sentence(photo, tiny_folder, monkeypatch, capsys, words, message):
    monkeypatch.setenv("DIPTYCH_TINY_FOLDER", str(tiny_folder))
    assert cli.main(["edit", str(photo), "make it red", *words]) == 2
    assert message in capsys.readouterr().err
