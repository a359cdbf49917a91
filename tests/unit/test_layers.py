"""The rooms of the house (docs/architecture.md): imports go down only, and never round in a circle."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the bottom up. A module belongs to the longest name that begins it; rooms of one line are strangers.
FLOORS = [
    "missing",
    "failures",
    "samplers",
    "models",
    "training.runtime",
    "training.notation",
    "training.tiny training.multimodal",
    "training.config",
    "training.data",
    "training.tasks training.rewards",
    "training.evaluate",
    "training.trained training.callbacks",
    "training.trainer",
    "training.reinforce",
    "training",
    "nodes commands",
    "page",
    "commands.web",
    "",
]
FLOOR = {room: number for number, line in enumerate(FLOORS) for room in line.split(" ")}
# ComfyUI's side of a sampler reads masks as every node does; the list of commands names the page's.
EXCEPTIONS = {("samplers.comfy_tiles", "models.pixels"), ("commands", "commands.web")}


@cache
def modules() -> dict[str, Path]:
    """Every module of the pack by its dotted name below the root; "" is the pack itself."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in ("samplers", "models", "training", "nodes", "commands", "page") or len(parts) == 1:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """The pack's modules that a module imports, at the top or inside a function."""
    package = name.split(".") if modules()[name].name == "__init__.py" else name.split(".")[:-1]
    package, found = [part for part in package if part], set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in modules() else ".".join(base))
    return frozenset(found - {name})


def room(name: str) -> str:
    return max((r for r in FLOOR if not r or name == r or name.startswith(r + ".")), key=len)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name):
    upward = [
        other
        for other in imports(name)
        if room(other) != room(name)
        and FLOOR[room(other)] >= FLOOR[room(name)]
        and (name, other) not in EXCEPTIONS
    ]
    assert not upward, f"{name} of {room(name)} imports {upward}"


def test_no_module_imports_itself_in_a_circle():
    left = {name: set(imports(name)) & set(modules()) for name in modules()}
    while free := [
        name
        for name, others in left.items()
        if not others & left.keys() or not any(name in others for others in left.values())
    ]:
        for name in free:
            del left[name]
    circles = {name: sorted(others & left.keys()) for name, others in left.items()}
    assert not circles


def test_training_has_few_files_lying_flat():
    assert len(list((ROOT / "training").glob("*.py"))) <= 10
