"""A signal is a wish: heeded where work would be lost, obeyed at once where none would, twice means now."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
from comfyui_diptych import cli
from comfyui_diptych.commands import doctor, train
from comfyui_diptych.commands.stopping import Stop, Stopped

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are sent in another way there")


@pytest.fixture(params=SIGNALS, ids=lambda number: number.name)
def number(request, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


def test_before_the_work_a_signal_ends_at_once(number):
    with pytest.raises(Stopped, match="nothing was lost") as stopped:
        with Stop("nothing was lost"):
            signal.raise_signal(number)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == signal.SIG_DFL


def test_during_the_work_it_is_told_to_whoever_asks_and_a_second_one_ends(number, capsys):
    with pytest.raises(Stopped, match="stopped at once"):
        with Stop("", "stopping after this step") as stop:
            assert not stop.asked()
            signal.raise_signal(number)
            assert stop.asked() and stop.signal == number
            assert "stopping after this step; once more ends at once" in capsys.readouterr().err
            signal.raise_signal(number)


def test_a_launcher_may_pass_on_what_the_terminal_has_sent(number, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Stop("", "stopping") as stop:
        stop.asked()
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.asked()


def test_nohup_keeps_its_meaning():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop("") as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.signal
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143), (1, 129)])
def test_the_command_ends_with_the_signals_code_and_one_sentence(number, code, monkeypatch, capsys):
    def run(args):
        raise Stopped(number, "stopped at step 3")

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == "diptych doctor: stopped at step 3\n"


def test_a_stopped_run_says_the_command_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = SimpleNamespace(max_steps=9)
    places = {"output": tmp_path, "checkpoints": tmp_path / "c"}
    trainer = SimpleNamespace(processes=SimpleNamespace(main=True), step=3, config=config, **places)
    args = SimpleNamespace(words=["train", "icedit", "--set", "lr=1 e", "--resume", "old", "--resume=x"])
    said = str(train.stopped(args, trainer, tmp_path / "c" / "step_3", SimpleNamespace(signal=2)))
    assert said.startswith(f"stopped at step 3 of 9, checkpoint {tmp_path / 'c' / 'step_3'}")
    assert said.endswith("to go on: diptych train icedit --set 'lr=1 e' --resume auto")


def test_a_part_of_the_tiny_models_that_is_stopped_says_what_is_kept(tmp_path, monkeypatch):
    from comfyui_diptych.training.tiny import vae

    def stopped(recipe, progress, should_stop):
        should_stop()
        signal.raise_signal(signal.SIGINT)
        assert should_stop()
        (tmp_path / "state.pt").touch()
        return tmp_path / "state.pt"

    monkeypatch.setattr(vae, "train", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Stopped, match="state.pt is kept; the same command goes on from it") as ended:
            train._train_world({"task": "vae", "output_dir": str(tmp_path)})
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
