"""`diptych docs` names every page, in a clone its file, elsewhere its address."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui_diptych import cli, missing
from comfyui_diptych.commands import docs

ROOT = Path(__file__).parents[2]


def test_every_page_of_the_folder_has_its_line(capsys):
    assert set(docs.PAGES) == {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert cli.main(["docs"]) == 0
    said = capsys.readouterr().out
    assert all(str(ROOT / "docs" / f"{name}.md") in said for name in docs.PAGES)


def test_a_wheel_names_the_address_and_the_browser_opens_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(missing, "__file__", str(tmp_path / "missing.py"))
    opened = []
    monkeypatch.setattr(docs.webbrowser, "open", opened.append)
    assert cli.main(["docs", "grpo", "--open"]) == 0
    assert capsys.readouterr().out.split() == opened == [f"{missing.DOCS}/grpo.md"]


def test_an_unknown_page_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        cli.main(["docs", "gripo"])
    assert "grpo" in capsys.readouterr().err
