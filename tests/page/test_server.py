"""The server behind the page: the loopback address alone, no file of the machine, nothing left at the end."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from urllib.parse import quote, urlsplit

import page_process
import pytest
from comfyui_diptych.models import tiny

ROOT = Path(__file__).parents[2]


def ask(web, path: str, host: str | None = None, body: dict | None = None) -> tuple[int, bytes]:
    place = urlsplit(web.url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=300)
    headers = {"Host": host or place.netloc, "Content-Type": "application/json"}
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_the_page_is_there_and_not_under_another_name(web):
    status, page = ask(web, "/")
    assert status == 200 and b"Diptych" in page
    assert ask(web, "/", host="evil.example")[0] == 400
    assert urlsplit(web.url).hostname == "127.0.0.1"


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", str(ROOT / "README.md"), str(tiny.folder() / "card.json"), "in the working folder"],
)
def test_no_file_of_the_machine_is_served(web, path):
    if not path.startswith("/"):
        path = str(web.folder / "secret.txt")
        Path(path).write_text("secret")
    for address in (path, quote(path, safe=""), f"x/../..{path}"):
        assert ask(web, f"/gradio_api/file={address}")[0] in (400, 403, 404)


def test_its_own_files_are_served(web):
    _, config = ask(web, "/config")
    files = [str(path) for path in web.folder.glob("diptych_web_*/files/**/*.png")]
    assert files and b"gradio" in config
    assert ask(web, f"/gradio_api/file={files[0]}")[0] == 200


def test_no_event_can_be_called_by_name(web):
    status, answer = ask(web, "/gradio_api/info")
    assert status != 200 or json.loads(answer)["named_endpoints"] == {}


def test_a_signal_ends_it_and_leaves_nothing(web, tmp_path):
    other = page_process.begin(tmp_path)
    assert other.url != web.url and list(tmp_path.glob("diptych_web_*"))
    assert page_process.end(other) == 143
    assert not list(tmp_path.glob("diptych_web_*"))
