"""Places for results are looked at before the work, and what was made is kept when its place fails."""

from __future__ import annotations

import logging

import pytest
from comfyui_diptych.training.runtime import disk


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".hidden",
        " a",
        "a.",
        "a/b",
        "a\\b",
        "a:b",
        "a?",
        "a*",
        'a"',
        "a<b",
        "a|b",
        "a\nb",
        "con",
        "LPT1.x",
        "x" * 250,
    ],
)
def test_names_that_some_file_system_refuses_are_refused(name):
    with pytest.raises(ValueError, match="output name"):
        disk.check_name(name, "output name")


@pytest.mark.parametrize("name", ["my lora", "caf\u00e9", "a.b-c_d", "console"])
def test_other_names_are_kept(name):
    assert disk.check_name(name, "output name") == name


def test_looking_at_a_folder_makes_nothing(tmp_path):
    assert disk.check_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    disk.check_file(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, choose another folder"):
        disk.check_folder(tmp_path / "file" / "x")
    with pytest.raises(ValueError, match="is a folder: name a file"):
        disk.check_file(tmp_path)

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match="cannot be written .Read-only file system.: choose another"):
        disk.check_folder(tmp_path)


def test_room_is_compared_with_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match="needs about 1000000.0 TB but its disk has"):
        disk.check_folder(tmp_path, need=10**18)


def test_what_cannot_be_written_goes_elsewhere_and_says_so(tmp_path, monkeypatch, caplog):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    (tmp_path / "home" / "out.txt").write_text("somebody's")

    def write(place):
        if place.parent.name == "full":
            raise OSError(28, "No space left on device")
        place.write_text("made")

    with caplog.at_level(logging.WARNING):
        place = disk.keep(tmp_path / "full" / "out.txt", write)
    assert place.read_text() == "made" and place.name == "out_2.txt"
    assert (tmp_path / "home" / "out.txt").read_text() == "somebody's"
    assert str(place) in caplog.text and "No space left" in caplog.text


def test_an_error_of_the_work_itself_is_not_taken_for_a_full_disk(tmp_path):
    def write(place):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        disk.keep(tmp_path / "out", write)
    assert disk.failed_write(RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"))
    assert not disk.failed_write(RuntimeError("shapes differ"))


def test_a_half_written_file_never_has_the_name(tmp_path):
    def write(place):
        place.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        disk.write_whole(tmp_path / "out.txt", write)
    assert not list(tmp_path.iterdir())
