"""The completion scripts in real shells: what Tab offers is what the parsers and recipes have."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("yaml")
from comfyui_diptych import cli
from comfyui_diptych.commands import completion, shells, values
from comfyui_diptych.training import recipes
from comfyui_diptych.training.config import TrainConfig
from comfyui_diptych.training.reinforce.config import GRPOConfig

BREAKS = " \t\n\"'><=;|&(:"
HARNESS = """
. "$1"
COMP_WORDBREAKS=$2
while IFS= read -r line; do
  COMP_LINE=$line COMP_POINT=${#line} COMPREPLY=(left over)
  _diptych
  echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[str, Path]:
    """A file for each shell that is here."""
    folder, places = tmp_path_factory.mktemp("scripts"), completion.places(cli.build_parser())
    found = {}
    for shell, writer in shells.WRITERS.items():
        path = folder / f"diptych.{shell}"
        path.write_text(writer(places), encoding="utf-8")
        if shutil.which(shell):
            subprocess.run([shell, "-n", str(path)], check=True, timeout=60)
            found[shell] = path
    return found


def bash(script: Path, lines: list[str], breaks: str = BREAKS) -> list[list[str]]:
    """What the function for bash offers for each line, as readline is given it."""
    command = ["bash", "--norc", "-c", HARNESS, "bash", str(script), breaks]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return [line.split() for line in done.stdout.splitlines()]


def fish(script: Path, line: str) -> list[str]:
    command = ["fish", "--no-config", "-c", f"source {script}; complete -C {shells._fq(line)}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=script.parent)
    assert done.stderr == ""
    return [line.partition("\t")[0] for line in done.stdout.splitlines()]


def typed(shell: list[str], script: Path, begin: str, line: str) -> str:
    """The line as a shell on a terminal has it after Tab."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(script.parent)
        os.execvpe(
            shell[0], shell, {**os.environ, "TERM": "dumb", "PS1": "", "HISTFILE": "", "COLUMNS": "500"}
        )
    try:
        os.write(terminal, f"{begin}\necho rea''dy\n".encode())
        read_until(terminal, "ready\r")
        os.write(terminal, f"echo {line}".replace("echo diptych", "diptych", 1).encode() + b"\t")
        time.sleep(0.5)
        os.write(terminal, b"\x01: \x05\n")  # to the line's start, make it do nothing, to its end, enter
        os.write(terminal, b"echo do''ne\n")
        return read_until(terminal, "done\r")
    finally:
        os.close(terminal)
        os.kill(child, 9)
        os.waitpid(child, 0)


def read_until(terminal: int, end: str) -> str:
    seen, late = "", time.monotonic() + 60
    while end not in seen and time.monotonic() < late:
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
    assert end in seen, seen
    return seen


def subparsers() -> dict[str, argparse.ArgumentParser]:
    """Every parser by its words."""
    return {parser.prog: parser for parser in values.parsers(cli.build_parser())}


def test_every_option_of_every_command_is_offered(scripts):
    parsers = subparsers()
    assert {"diptych", "diptych edit", "diptych glid split"} <= parsers.keys()
    for prog, offered in zip(parsers, bash(scripts["bash"], [f"{p} -" for p in parsers]), strict=True):
        assert set(offered) == set(parsers[prog]._option_string_actions), prog


OFFERED = [
    ("diptych ", {"edit", "train", "glid", "completion"}),
    ("diptych out", {"outpaint"}),
    ("diptych -v glid ", {"split", "merge", "folder"}),
    ("diptych edit --engine ", {"fill", "kontext"}),
    ("diptych edit photo.png --engine k", {"kontext"}),
    ("diptych edit --eng", {"--engine"}),
    ("diptych edit -o ", set()),
    ("diptych edit --model train ", set()),
    ("diptych edit photo", set()),
    ("diptych train --set optimizer=", {"adamw", "prodigy", "adamw8bit"}),
    ("diptych train --set cache=", {"true", "false"}),
    ("diptych train icedit --set lr", {"lr=", "lr_warmup=", "lr_schedule=constant", "lr_schedule=cosine"}),
    ("diptych train --set even", {"even_ground=true", "even_ground=false"}),
    ("diptych grpo --set alg", {"algorithm=grpo", "algorithm=nft"}),
    ("diptych edit --engine=k", {"kontext"}),
    ("diptych completion z", {"zsh"}),
]
EXACT = ("diptych -v glid ", "diptych edit --engine ", "diptych edit -o ", "diptych edit photo")


@pytest.mark.parametrize(("line", "expected"), OFFERED, ids=[line for line, _ in OFFERED])
def test_what_bash_offers(scripts, line, expected):
    ((*offered,),) = bash(scripts["bash"], [line]) or [[]]
    assert expected <= set(offered) and (expected or not offered)
    if line in EXACT or len(expected) == 1:
        assert set(offered) == expected


def test_recipes_and_keys_are_all_there(scripts):
    lines = ["diptych train ", "diptych grpo ", "diptych train --set ", "diptych grpo --set "]
    train, grpo, of_training, of_grpo = map(set, bash(scripts["bash"], lines))
    names = {path.stem for path in recipes.RECIPES.glob("*.yaml")}
    assert train | grpo == names and {name for name in names if name.startswith("grpo_")} == grpo
    for offered, kind in ((of_training, TrainConfig), (of_grpo, GRPOConfig)):
        keys = {field.name for field in dataclasses.fields(kind)} - set(kind.unused)
        assert keys <= {word.partition("=")[0] for word in offered}


def test_where_an_equals_sign_ends_no_word_it_is_part_of_what_is_offered(scripts):
    lines = ["diptych edit --engine=k", "diptych train --set optimizer=p"]
    assert bash(scripts["bash"], lines, " \t\n") == [["--engine=kontext"], ["optimizer=prodigy"]]


def test_tab_in_an_interactive_bash(scripts):
    shell, begin = ["bash", "--norc", "--noprofile", "-i"], f"source {scripts['bash']}"
    assert "grpo_tiny_kontext " in typed(shell, scripts["bash"], begin, "diptych grpo grpo_tiny_k")
    assert "optimizer=adamw8bit " in typed(
        shell, scripts["bash"], begin, "diptych train --set optimizer=adamw8"
    )
    (scripts["bash"].parent / "my_photo.png").touch()
    assert "my_photo.png" in typed(shell, scripts["bash"], begin, "diptych edit my_ph")


def test_tab_in_an_interactive_zsh(scripts):
    if "zsh" not in scripts:
        pytest.skip("zsh is not installed")
    begin = f"autoload -U compinit; compinit -u -D; source {scripts['zsh']}"
    for line, word in (
        ("diptych grpo grpo_tiny_k", "grpo_tiny_kontext"),
        ("diptych train --set optimizer=adamw8", "optimizer=adamw8bit"),
        ("diptych edit --engine=ko", "--engine=kontext"),
        ("diptych glid spl", "glid split"),
        ("diptych outpaint --keep", "--keep-colours"),
    ):
        assert word in typed(["zsh", "-f", "-i"], scripts["zsh"], begin, line)


def test_what_fish_offers(scripts):
    if "fish" not in scripts:
        pytest.skip("fish is not installed")
    for line, expected in OFFERED:
        offered = {
            word.rpartition("=")[2] if line.endswith("=") else word for word in fish(scripts["fish"], line)
        }
        offered |= {word.rpartition("=")[2] for word in offered if "--engine=" in word}
        assert expected <= offered, line
    parsers = subparsers()
    for prog in ("diptych score", "diptych glid split"):
        long = {option for option in parsers[prog]._option_string_actions if option.startswith("--")}
        assert long == set(fish(scripts["fish"], f"{prog} --")), prog


def test_a_description_holds_nothing_that_a_shell_reads():
    assert shells._short("it's 50 % of `x` $HOME [y]\n and more") == "its 50  of x HOME y and more".replace(
        "  ", " "
    )
    assert shells._short("word " * 40).endswith("word ...") and len(shells._short("word " * 40)) <= 75


@pytest.mark.parametrize("shell", shells.WRITERS)
def test_the_command_prints_the_script(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "icedit" in script and "optimizer=" in script
    assert cli.main(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == {"shell": shell, "script": script}
