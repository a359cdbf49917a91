"""--json, exit codes, -v and the look of progress, of commands that cost nothing or are taken over."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from pathlib import Path

import pytest
from comfyui_diptych import cli
from comfyui_diptych.commands import answers, doctor, progress, values
from comfyui_diptych.commands.stopping import Stopped


def json_of(capsys, *words: str, code: int = 0) -> dict:
    """The one JSON object that a command prints; nothing else may be on stdout."""
    try:
        assert cli.main([*words, "--json"]) == code
    except SystemExit as left:
        assert left.code == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.isascii()
    answer = json.loads(out)
    assert set(answer) == {"command", "exit_code", "result", "error"}
    assert answer["exit_code"] == code and (answer["error"] is None) == (code == 0)
    return answer


def taken_over(monkeypatch, run) -> None:
    monkeypatch.setattr(doctor, "run", run)


def test_what_a_command_prints_goes_to_stderr_and_its_answer_alone_to_stdout(monkeypatch, capsys):
    made = {"image": Path("caf\u00e9.png"), "score": math.nan, "many": (1, 2.5, True, None)}
    taken_over(monkeypatch, lambda args: print("words") or made)
    assert cli.main(["doctor", "--json"]) == 0
    seen = capsys.readouterr()
    assert seen.err == "words\n"
    assert json.loads(seen.out) == {
        "command": "doctor",
        "exit_code": 0,
        "result": {"image": "caf\u00e9.png", "score": None, "many": [1, 2.5, True, None]},
        "error": None,
    }
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "words\n"


ENDINGS = [
    (ValueError("size is 3: use 4"), "input", 2, "size is 3: use 4"),
    (ZeroDivisionError("x"), "fault", 1, "unexpected ZeroDivisionError"),
    (KeyboardInterrupt(), "stopped", 130, "stopped"),
    (Stopped(15, "stopped at step 3", step=3), "stopped", 143, "stopped at step 3"),
]


@pytest.mark.parametrize(("error", "kind", "code", "message"), ENDINGS, ids=[kind for _, kind, *_ in ENDINGS])
def test_errors_are_json_with_their_exit_code(error, kind, code, message, monkeypatch, capsys):
    def run(args):
        raise error

    taken_over(monkeypatch, run)
    answer = json_of(capsys, "doctor", code=code)
    assert answer["error"]["kind"] == kind and answer["error"]["message"].startswith(message)
    assert answer["result"] == ({"step": 3} if isinstance(error, Stopped) else {})


WRONG = [
    (["edit", "--steps", "0"], "edit", "--steps: it is 0"),
    (["edit", "--stpes", "3"], "edit", "did you mean --steps?"),
    (["glid", "split"], "glid", "the following arguments are required"),
    (["trian"], "", "invalid choice: 'trian'"),
    ([], "", "the following arguments are required: COMMAND"),
]


@pytest.mark.parametrize(("words", "command", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_a_wrong_command_line_is_json_too(words, command, message, capsys):
    answer = json_of(capsys, *words, code=2)
    assert answer["error"]["kind"] == "usage" and message in answer["error"]["message"]
    assert answer["command"] == command


def test_the_common_options_are_everywhere():
    for parser in values.parsers(cli.build_parser()):
        assert {"--json", "-v", "--debug"} <= set(parser._option_string_actions), parser.prog


def test_only_the_first_process_of_a_launched_training_answers(monkeypatch, capsys):
    taken_over(monkeypatch, lambda args: {"x": 1})
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["doctor", "--json"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "level"),
    [([], logging.WARNING), (["-v"], logging.INFO), (["-vv"], logging.DEBUG), (["-v", "-v"], logging.DEBUG)],
)
def test_v_is_the_level_of_the_log(words, level, monkeypatch):
    seen = []
    taken_over(monkeypatch, lambda args: seen.append(logging.getLogger().level))
    before = logging.getLogger().level
    try:
        cli.main(["doctor", *words])
        cli.main([*words[:1], "doctor"])
    finally:
        logging.getLogger().setLevel(before)
    assert seen[0] == level
    assert seen[1] == (logging.INFO if words[:1] == ["-v"] else level)


def test_the_kinds_of_errors_are_those_that_are_told():
    assert {kind for _, kind, *_ in ENDINGS} | {"usage"} == set(answers.KINDS)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.Bar("training", 10, done=4) as bar:
        for step in range(5, 11):
            bar.to(step, loss=0.5)
    shown = sys.stderr.getvalue().split("\r")[-1]
    assert shown.startswith("training |") and "10 of 10 steps" in shown and "loss=0.5" in shown


def test_without_a_terminal_short_work_says_nothing_and_long_work_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.Bar("editing", 28) as bar:
        for _ in range(28):
            now[0] += 1
            bar.advance()
    assert sys.stderr.getvalue() == ""
    with progress.Bar("training", 300, done=100) as bar:
        for step in range(101, 301):
            now[0] += 0.5
            bar.to(step, loss=1 / step)
    assert sys.stderr.getvalue().splitlines() == [
        "training: 160 of 300 steps, 0:30, 1:10 left, loss 0.00625",
        "training: 220 of 300 steps, 1:00, 0:40 left, loss 0.004545",
        "training: 280 of 300 steps, 1:30, 0:10 left, loss 0.003571",
        "training: 300 of 300 steps, 1:40, loss 0.003333",
    ]


def test_a_total_may_come_later_and_grow(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = progress.Bar("painting")
    bar.more(4)
    bar.more(4)
    bar.advance(3)
    assert bar.line(60) == "painting: 3 of 8 steps, 1:00, 1:40 left"


def test_one_thing_needs_no_bar_and_a_loop_ends_where_its_reader_stops(monkeypatch):
    monkeypatch.setattr(progress, "Bar", None)
    assert list(progress.over([1], "reading")) == [1]
    monkeypatch.undo()
    assert next(iter(progress.over(iter("ab"), "reading"))) == "a"


@pytest.mark.parametrize(("seconds", "said"), [(0, "0:00"), (62, "1:02"), (3723.4, "1:02:03")])
def test_time_in_words(seconds, said):
    assert progress.clock(seconds) == said
