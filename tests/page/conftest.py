"""A running page for the tests, and a browser for it."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import page_process  # noqa: E402

NO_BROWSER = (
    "no browser for the test: install chromium (apt-get install chromium) and node, and run "
    "`npm install --no-save playwright-core` in the pack's folder (or name its folder in PLAYWRIGHT_CORE)"
)


@pytest.fixture(scope="session")
def web(tmp_path_factory):
    """The page with the tiny models."""
    if find_spec("gradio") is None:
        pytest.skip('the page needs gradio: pip install "gradio>=6.31,<7"')
    running = page_process.begin(tmp_path_factory.mktemp("web"), pause=0.2)
    yield running
    page_process.end(running)


@pytest.fixture(scope="session")
def browser():
    """(node, playwright-core folder, chromium)"""
    folders = [os.environ.get("PLAYWRIGHT_CORE"), HERE.parents[1] / "node_modules" / "playwright-core"]
    playwright = next((str(folder) for folder in folders if folder and Path(folder).is_dir()), None)
    chromes = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    chromium = next((found for name in chromes if name and (found := shutil.which(name))), None)
    node = shutil.which("node")
    if not (node and playwright and chromium):
        pytest.skip(NO_BROWSER)
    return node, playwright, chromium
