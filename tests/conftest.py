"""Options of the whole test suite; and what lets a tree of any name, anywhere, be tested."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


class RootIsNoTestPackage:
    """Collects the repository root as a plain folder.

    Its `__init__.py` makes it a custom node and the package `comfyui_diptych`. To pytest the same file says
    that the tests are submodules of a package named like the folder, which need not be an identifier.
    """

    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path.resolve() == ROOT else None


def import_this_tree() -> None:
    """Let `import comfyui_diptych` find this tree, here and in child processes, whatever is installed."""
    found = importlib.util.find_spec("comfyui_diptych")
    if found and found.origin and Path(found.origin).resolve() == ROOT / "__init__.py":
        return
    folder = Path(tempfile.mkdtemp(prefix="diptych_tests_"))
    package = folder / "comfyui_diptych"
    package.mkdir()
    source = str(ROOT / "__init__.py")
    (package / "__init__.py").write_text(
        f"__file__, __path__ = {source!r}, [{str(ROOT)!r}]\n"
        "exec(compile(open(__file__, encoding='utf-8').read(), __file__, 'exec'))  # noqa: S102\n",
        encoding="utf-8",
    )
    sys.path.insert(0, str(folder))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([before] if before else [])])


def pytest_configure(config):
    config.pluginmanager.register(RootIsNoTestPackage())
    import_this_tree()


def pytest_runtest_setup(item):
    """Every test draws the same numbers, alone or behind others: a tolerance holds or it does not."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption(
        "--require-comfyui",
        action="store_true",
        help="fail, instead of skip, the tests that need a real ComfyUI (or its browser) where none is found",
    )
    parser.addoption(
        "--comfyui-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="run the real ComfyUI with an option of its main.py, such as --comfyui-option=--cache-none",
    )
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow") or "slow" in (config.option.markexpr or ""):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
