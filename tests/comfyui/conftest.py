"""One pytest test per case, run by a child process in ComfyUI's own interpreter (booted once per ComfyUI).

The child runs just the selected cases in their order and writes a JSON line each; a test waits for its line.
Also here: a real server (`main.py` in a process of its own) for the tests over HTTP and in a browser.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from comfyui_diptych.commands import installed

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import comfy_cases  # noqa: E402
import finding  # noqa: E402

BOOT_SECONDS, CASE_SECONDS = 600, 600  # a hang, not slowness: machines differ


def pytest_generate_tests(metafunc):
    if "comfyui" in metafunc.fixturenames:
        found = installed.comfyui_folders() or [None]
        names = [
            "not found" if path is None else installed.comfyui_version(path) or path.name for path in found
        ]
        metafunc.parametrize("comfyui", found, ids=names, scope="session", indirect=True)
    if "comfy_case" in metafunc.fixturenames:
        marks = {True: [pytest.mark.slow], False: []}
        cases = [pytest.param(i, marks=marks[comfy_cases.is_slow(i)]) for i in comfy_cases.case_ids()]
        metafunc.parametrize("comfy_case", cases)


def pytest_collection_finish(session):
    """Remember which cases were selected for which ComfyUI: the child is asked for no others."""
    selected: dict[Path, list[str]] = {}
    for item in session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "comfy_case" in parameters and parameters["comfyui"] is not None:
            selected.setdefault(parameters["comfyui"], []).append(parameters["comfy_case"])
    session.config.stash[SELECTED] = selected


def pytest_terminal_summary(terminalreporter):
    if "skipped" in terminalreporter.stats and not installed.comfyui_folders():
        terminalreporter.write_line(f"tests/comfyui skipped: {finding.HOW_TO_GET_ONE}")


SELECTED = pytest.StashKey[dict]()


@pytest.fixture(scope="session")
def comfyui(request):
    """The folder of a real ComfyUI; skips (or fails under --require-comfyui) where there is none."""
    if request.param is None or not installed.is_comfyui(request.param):
        message = finding.HOW_TO_GET_ONE if request.param is None else f"{request.param} is no ComfyUI folder"
        if request.config.getoption("--require-comfyui"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return request.param


@pytest.fixture(scope="session")
def base_folder(comfyui, tmp_path_factory):
    """A scratch folder that stands in for ComfyUI's own custom_nodes, models, input and output."""
    return finding.make_base(tmp_path_factory.mktemp("comfyui_base") / "base", comfyui)


class Child:
    """Runs the cases of one ComfyUI in a process; one that dies or hangs is replaced for the next case."""

    def __init__(self, comfyui: Path, base: Path, cases: list[str], options: list[str]):
        self.comfyui, self.base, self.left, self.options = comfyui, base, list(cases), options
        self.log = base.parent / "comfy_host.log"
        self.process = None

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [
                finding.interpreter(self.comfyui),
                str(HERE / "comfy_host.py"),
                str(self.comfyui),
                str(self.base),
                *self.options,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("wb"),
            env=finding.environment(),
        )
        self.process.stdin.write(json.dumps(self.left).encode())
        self.process.stdin.close()
        self.lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()

    @staticmethod
    def _read(process, lines: queue.Queue) -> None:
        for line in process.stdout:
            lines.put(json.loads(line))
        lines.put(None)

    def result(self, case: str) -> dict:
        """The line of a case; cases come in the order in which the child was given them."""
        line = {}
        if self.process is None:
            self._start()
            line = self._next(BOOT_SECONDS)
        while line is not None and line.get("case") != case:
            line = self._next(CASE_SECONDS)
        self.left = self.left[self.left.index(case) + 1 :]
        if line is None:
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-6000:]
            self.close()
            line = {"outcome": "failed", "detail": f"ComfyUI died or hung; the end of its log:\n{tail}"}
        return line

    def _next(self, seconds: float) -> dict | None:
        try:
            return self.lines.get(timeout=seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process = None


@pytest.fixture(scope="session")
def child(request, comfyui, base_folder):
    cases = request.config.stash[SELECTED].get(comfyui, [])
    running = Child(comfyui, base_folder, cases, request.config.getoption("--comfyui-option"))
    yield running
    running.close()


class Server:
    """A running ComfyUI server with the pack in it, and the few requests the tests make."""

    def __init__(self, comfyui: Path, base: Path, more: list[str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.base = f"http://127.0.0.1:{port}", base
        self.log = base.parent / "server.log"
        options = ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
        options += [
            "--disable-auto-launch",
            "--disable-api-nodes",
            "--database-url",
            "sqlite:///:memory:",
            *more,
        ]
        if os.environ.get("DIPTYCH_TEST_DEVICE", "cpu") == "cpu":
            options.append("--cpu")
        self.process = subprocess.Popen(
            [finding.interpreter(comfyui), str(comfyui / "main.py"), *options],
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            env=finding.environment(),
            cwd=comfyui,
        )
        self.poll(lambda: self.get("/system_stats"), BOOT_SECONDS)

    def poll(self, question, seconds: float):
        """Ask until the answer is true; a server that dies or stays silent fails the test with its log."""
        tick = threading.Event()
        for _ in range(int(seconds * 5)):
            if self.process.poll() is not None:
                break
            try:
                if answer := question():
                    return answer
            except urllib.error.URLError:
                pass
            tick.wait(0.2)
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-4000:]
        pytest.fail(f"the ComfyUI server did not answer; the end of its log:\n{tail}", pytrace=False)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def get_json(self, path: str):
        return json.loads(self.get(path))

    def post(self, path: str, content) -> bytes:
        request = urllib.request.Request(self.url + path, json.dumps(content).encode(), method="POST")
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def run(self, prompt: dict, seconds: float = CASE_SECONDS) -> dict:
        """Queue an API prompt and return its history entry when it is done."""
        number = json.loads(self.post("/prompt", {"prompt": prompt}))["prompt_id"]
        return self.poll(lambda: self.get_json(f"/history/{number}").get(number), seconds)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="session")
def server(request, comfyui, tmp_path_factory):
    """A server on a free port with a base folder of its own."""
    base = finding.make_base(tmp_path_factory.mktemp("comfyui_server") / "base", comfyui)
    running = Server(comfyui, base, request.config.getoption("--comfyui-option"))
    yield running
    running.close()
