"""What the pages say is there: links, files, commands with their flags, options of recipes."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("yaml")
from comfyui_diptych import cli
from comfyui_diptych.training import recipes
from comfyui_diptych.training.config import TASKS, TinyTrainConfig
from comfyui_diptych.training.reinforce.config import GRPOConfig, TinyGRPOConfig

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("web/**/*.md")]
HOME = re.compile(
    r"https://(raw\.githubusercontent|github)\.com/comfyui-diptych/ComfyUI-Diptych/(blob/)?main/"
)
FOLDERS = "training|tests|benchmarks|scripts|docs|web|locales|example_workflows"
FILE = re.compile(rf"(?:python )?((?:{FOLDERS})/[\w/.-]+)(?: .*)?")
OPTIONS = {field.name for kind in (TinyTrainConfig, TinyGRPOConfig) for field in dataclasses.fields(kind)}
KINDS = {"train": TinyTrainConfig, "grpo": TinyGRPOConfig, "precompute": TinyTrainConfig}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def code(page: Path) -> list[str]:
    """What stands in backticks: the lines of blocks, one command each, and the pieces within sentences."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [*(line for block in blocks for line in block.splitlines()), *inline]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> list[list[str]]:
    """The words behind every `diptych` of a page, and behind every `-m comfyui_diptych`."""
    lines = [part for line in code(page) for part in line.split("&&")]
    found = [re.search(r"(?:^\s*diptych|-m comfyui_diptych)\s+([a-z].*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        base, link = (ROOT, HOME.sub("", link)) if HOME.match(link) else (page.parent, link)
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = base / path if path else page
            assert target.exists() and (not anchor or anchor in anchors(target)), link


@every_page
def test_files_and_folders_of_ours_exist(page):
    files = {match[1] for piece in code(page) if (match := FILE.fullmatch(piece))}
    assert not {
        file for file in files if "NAME" not in file and "_X" not in file and not (ROOT / file).exists()
    }


@every_page
def test_commands_have_these_flags_and_recipes_these_options(page):
    for words in commands(page):
        parser = cli.build_parser()
        for word in words:
            nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
            if nested and not word.startswith("-"):
                assert word in nested[0].choices, words
                parser = nested[0].choices[word]
            elif re.match(r"--?[a-z]", word):
                assert word.partition("=")[0] in parser._option_string_actions, words
        overrides = [word for flag, word in zip(words, words[1:], strict=False) if flag == "--set"]
        assert {text.partition("=")[0] for text in overrides} <= OPTIONS, words
        if words[0] in ("train", "grpo") and len(words) > 1 and re.fullmatch(r"[a-z]\w+", words[1]):
            values = recipes.read(words[1], overrides)
            if "..." not in words and values.get("task") in TASKS:
                recipes.from_dict(values, KINDS[words[0]])


@every_page
def test_options_are_those_there_are(page):
    pieces = code(page)
    assert not set(pieces) & GRPOConfig.gone.keys() - {"class_prompt"}  # the name of a node's input too
    if ROOT / "docs" in page.parents and page.name not in ("outpainting.md", "multimodal.md"):
        named = {match[1] for piece in pieces if (match := re.match(r"([a-z]\w*)(?:: |=)", piece))}
        assert named <= OPTIONS | {"extends", "keep_l1"}
