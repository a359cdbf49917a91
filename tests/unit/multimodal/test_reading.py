"""What a model says of a prompt's words, and what the command line passes on of it."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from comfyui_diptych import cli
from comfyui_diptych.models.multimodal import word_tokenizer
from comfyui_diptych.models.multimodal.reading import known_words, remarks, unknown_words
from comfyui_diptych.models.multimodal.storage import bundled


@pytest.mark.parametrize(
    "text, unknown",
    [
        ("a small red circle, at the top left.", []),
        ("A SMALL Red Circle!", []),
        ("(a red circle)", []),
        ("a sunset over a circle, sunset", ["sunset", "over"]),
        ("a reddish circle", ["reddish"]),
        ("ein roter Kreis 圆", ["ein", "roter", "Kreis", "圆"]),
        ("", []),
    ],
)
def test_words_without_a_token_are_told_apart(tokenizer, text, unknown):
    assert unknown_words(tokenizer, text) == unknown


def test_a_small_vocabulary_is_listed_and_a_large_one_is_not(tokenizer):
    expected = (
        "a and at background blue bottom circle cross green large left red right small square the top with"
    )
    assert known_words(tokenizer) == expected.split()
    letters = "abcdefghijkl"
    assert known_words(word_tokenizer([a + b for a in letters for b in letters])) == []


def test_what_is_not_read_is_said_once_a_prompt(shared):
    assert remarks(shared, ["a red circle", "a blue square"]) == []
    first, second = remarks(shared, ["a red sunset", "a blue square", "a dog"])
    assert first.startswith("'a red sunset': not known sunset; read a red; it knows a, and, at, ")
    assert second.startswith("'a dog': not known dog; read a; ")


def test_what_is_cut_off_is_said(shared):
    limit = shared.architecture.max_tokens
    assert remarks(shared, " ".join(["red"] * (limit - 2))) == []
    (said,) = remarks(shared, " ".join(["red"] * limit))
    assert "its last 2 tokens are cut off" in said


@pytest.mark.parametrize("prompt", ["Sonnenuntergang", "!!!", "圆"])
def test_a_prompt_of_which_nothing_is_known_is_an_error(shared, prompt):
    with pytest.raises(ValueError, match="has no word that this model knows; it knows a, and, at"):
        remarks(shared, ["a red circle", prompt])


def test_the_shell_says_what_it_did_not_read(shared, tmp_path, capsys):
    folder, out = shared.save_pretrained(tmp_path / "model"), tmp_path / "out.png"
    words = ["--model", str(folder), "-o", str(out), "--steps", "2"]
    assert cli.main(["generate", "a red sunset", *words]) == 0
    assert "'a red sunset': not known sunset; read a red" in capsys.readouterr().err
    out.unlink()
    assert cli.main(["generate", "Sonnenuntergang", *words]) == 2
    said = capsys.readouterr().err
    assert "has no word that this model knows" in said and not out.exists()


def test_a_pack_without_the_bundled_model_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_TINY_FOLDER", str(tmp_path))
    with pytest.raises(ValueError, match="tiny multimodal model is missing .*: reinstall the whole pack"):
        bundled()
