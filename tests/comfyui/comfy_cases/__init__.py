"""What is claimed of the pack inside a real ComfyUI: one function per claim, run by ComfyUI's interpreter.

These modules are imported twice: by pytest, to list the cases (so no ComfyUI import at the top), and by
`comfy_host.py`, to run them. A case takes the `Host`, and a parameter if it is made `each` of something.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CASES: dict[str, tuple[Callable, Callable[[], Iterable[str]] | None]] = {}
SLOW: set[str] = set()  # names of cases that run on demand only


class SkipCase(Exception):
    """Raised by a case that cannot run here, with the reason."""


def case(
    function: Callable | None = None,
    *,
    each: Callable[[], Iterable[str]] | None = None,
    slow: bool = False,
):
    """Register a claim; with `each`, one case per name that it yields; a slow one runs with --slow only."""
    if function is None:
        return lambda real: case(real, each=each, slow=slow)
    name = f"{function.__module__.rpartition('.')[2]}::{function.__name__}"
    CASES[name] = (function, each)
    if slow:
        SLOW.add(name)
    return function


def load_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def case_ids() -> list[str]:
    """Every case as `module::function` or `module::function[parameter]`, in file order."""
    load_all()
    return [
        full
        for name, (_, each) in CASES.items()
        for full in ([name] if each is None else [f"{name}[{parameter}]" for parameter in each()])
    ]


def is_slow(case_id: str) -> bool:
    return case_id.partition("[")[0] in SLOW


def find(case_id: str) -> tuple[Callable, tuple[str, ...]]:
    """The function of a case id and its arguments after the host."""
    name, _, rest = case_id.partition("[")
    return CASES[name][0], ((rest[:-1],) if rest else ())


def node_ids() -> list[str]:
    """The ids of the pack's nodes."""
    import comfyui_diptych

    return sorted(comfyui_diptych.NODE_CLASS_MAPPINGS)


def workflow_names() -> list[str]:
    return sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))


def workflow(name: str) -> dict:
    return json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
