"""Judges' weights are fetched with progress: the hub's own client against a small hub on this machine."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from comfyui_diptych.training.rewards import downloads

FILES = {"config.json": b"{}", "tokenizer.json": b"[1]", "model.safetensors": bytes(range(256)) * 9000}
OTHERS = {"pytorch_model.bin": b"x" * 999, "flax_model.msgpack": b"y", "onnx/model.safetensors": b"z"}
COMMIT = "a" * 40

FETCH = """
import json, sys
from comfyui_diptych.training.rewards import downloads
heard = []
def hear(here, total, repository):
    heard.append((here, total, repository))
    if len(sys.argv) > 1:
        raise KeyError("the stop button")
try:
    downloads.fetch({"path": "owner/judge", "tokenizer": "owner/other"}, hear)
except KeyError as error:
    heard.append(str(error))
folder = downloads.on_disk("owner/judge")
names = sorted(path.name for path in folder.iterdir()) if folder else []
before = len(heard)
if len(sys.argv) == 1:
    downloads.fetch({"path": "owner/judge"}, hear)
print(json.dumps({"heard": heard, "names": names, "again": len(heard) - before}))
"""


class Hub(BaseHTTPRequestHandler):
    """The two questions that the client asks: a repository's listing, and a file."""

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            files = [{"rfilename": name, "size": len(data)} for name, data in {**FILES, **OTHERS}.items()]
            body = {"id": "owner/judge", "sha": COMMIT, "siblings": files}
            return self._answer(json.dumps(body).encode(), {"Content-Type": "application/json"})
        data = {**FILES, **OTHERS}[self.path.partition("/resolve/main/")[2].partition("?")[0]]
        self._answer(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _answer(self, data, headers):
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(hub, home, monkeypatch, *words):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_HOME", str(home))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", FETCH, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_a_download_is_heard_byte_by_byte_and_brings_what_is_loaded(hub, tmp_path, monkeypatch):
    seen, said = fetch(hub, tmp_path, monkeypatch)
    total = sum(map(len, FILES.values()))
    assert seen["heard"][-1] == [total, total, "owner/judge"], said
    amounts = [here for here, _, _ in seen["heard"]]
    assert amounts == sorted(amounts) and len(amounts) >= len(FILES)
    assert seen["names"] == sorted(FILES) and seen["again"] == 0


def test_the_stop_button_ends_it(hub, tmp_path, monkeypatch):
    seen, _ = fetch(hub, tmp_path, monkeypatch, "stop")
    assert seen["heard"][-1] == "'the stop button'" and "model.safetensors" not in seen["names"]


def test_a_hub_out_of_reach_is_left_to_the_loader(tmp_path, monkeypatch):
    seen, said = fetch("http://127.0.0.1:9", tmp_path, monkeypatch)
    assert seen["heard"] == [] and seen["names"] == [] and "owner/judge was not fetched" in said


def test_only_what_transformers_loads_is_fetched():
    sizes = {name: len(data) for name, data in {**FILES, **OTHERS}.items()}
    assert set(downloads.wanted(sizes)) == set(FILES)
    del sizes["model.safetensors"]
    assert "pytorch_model.bin" in downloads.wanted(sizes)
    shards = {"model-00001-of-00002.safetensors": 1, "model-00002-of-00002.safetensors": 1}
    assert set(downloads.wanted({**shards, "model.fp16.safetensors": 1})) == set(shards)


def test_a_model_without_one_of_its_shards_is_not_complete(tmp_path):
    assert not downloads.complete(None) and not downloads.complete(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert not downloads.complete(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert downloads.complete(tmp_path)
