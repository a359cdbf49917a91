"""Boot a real ComfyUI in this process, load the pack as a custom node, run cases, report each as a JSON line.

Run by ComfyUI's interpreter: `comfy_host.py COMFYUI_FOLDER BASE_FOLDER [OPTIONS OF main.py]`, a JSON list of
case ids on stdin.
Not for the test environment: nothing here is imported by pytest.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class AnyType(str):
    """A socket type that ComfyUI's validation takes for equal to every other."""

    def __ne__(self, other: object) -> bool:
        return False


KEPT: dict[str, Any] = {}
GIVEN: dict[str, Any] = {}


class KeepValue:
    """Test-only output node: puts the value of any socket where the case can read it."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": (AnyType("*"),), "name": ("STRING",)}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "keep", "test", True

    def keep(self, value: Any, name: str) -> dict:
        KEPT[name] = value
        return {}


class GivenValue:
    """Test-only source node: the value that the case put under this name, as a socket of any type."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"name": ("STRING",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = (AnyType("*"),), "give", "test"

    def give(self, name: str) -> tuple:
        return (GIVEN[name],)


class Graph:
    """An API-format prompt made in code: `decoded = graph.add("VAEDecode", samples=other[0], vae=vae[0])`."""

    def __init__(self, nodes: dict[str, type]):
        self.nodes = nodes
        self.prompt: dict[str, dict] = {}

    def add(self, class_type: str, **inputs: Any) -> list[list]:
        """Add a node, widgets left out at their defaults; returns references to its first eight outputs."""
        for name, definition in self.nodes[class_type].INPUT_TYPES().get("required", {}).items():
            if name not in inputs and len(definition) > 1 and "default" in definition[1]:
                inputs[name] = definition[1]["default"]
        node = str(len(self.prompt) + 1)
        self.prompt[node] = {"class_type": class_type, "inputs": inputs}
        return [[node, slot] for slot in range(8)]

    def given(self, value: Any) -> list:
        """A reference to a value made by the case."""
        name = f"given {len(GIVEN)}"
        GIVEN[name] = value
        return self.add("TestGivenValue", name=name)[0]

    def keep(self, **values: list) -> Graph:
        for name, value in values.items():
            self.add("TestKeepValue", value=value, name=name)
        return self


@dataclass
class Run:
    """What one prompt did: nodes that ran (not cached), the values kept, and the error or interruption."""

    executed: list[str]
    kept: dict[str, Any]
    messages: list[tuple[str, dict]]
    outputs: dict

    def message(self, event: str) -> dict | None:
        return next((data for name, data in self.messages if name == event), None)

    @property
    def error(self) -> str:
        data = self.message("execution_error")
        return "" if data is None else f"{data['node_type']}: {data['exception_message']}"


class StubServer:
    """The little that PromptExecutor asks of the web server."""

    client_id, last_node_id, last_prompt_id, sockets_metadata = "tests", None, None, {}

    def __init__(self):
        self.events: list[tuple[str, Any]] = []

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        self.events.append((event, data))

    def send_progress_text(self, *_: Any) -> None:
        pass


class Host:
    """A booted ComfyUI with the pack in it."""

    def __init__(self, comfyui: Path, base: Path, options: list[str]):
        sys.path.insert(0, str(comfyui))
        os.chdir(comfyui)
        # The order matters: options before model_management, ComfyUI's `utils` package before its `nodes`.
        device = ["--cpu"] if os.environ.get("DIPTYCH_TEST_DEVICE", "cpu") == "cpu" else []
        sys.argv[1:] = ["--base-directory", str(base), "--preview-method", "latent2rgb", *device, *options]
        importlib.import_module("comfy.options").enable_args_parsing()
        self.args = importlib.import_module("comfy.cli_args").args
        importlib.import_module("utils.extra_config")
        self.comfy_nodes = importlib.import_module("nodes")
        self.execution = importlib.import_module("execution")
        self.comfyui, self.base = comfyui, base
        self.link = base / "custom_nodes" / "ComfyUI-Diptych"
        asyncio.run(self._load())
        self.nodes = self.comfy_nodes.NODE_CLASS_MAPPINGS
        self.nodes.update(TestKeepValue=KeepValue, TestGivenValue=GivenValue)
        self.executor = None

    @property
    def caches(self) -> bool:
        """Whether a node's results are kept for the next run."""
        return not getattr(self.args, "cache_none", False)

    def within(self, tolerance: float) -> float:
        """The tolerance of a comparison across nodes, wider where ComfyUI hands on float16."""
        return max(tolerance, 2e-2) if getattr(self.args, "fp16_intermediates", False) else tolerance

    async def _load(self) -> None:
        await self.comfy_nodes.init_public_apis()
        await self.comfy_nodes.init_builtin_extra_nodes()
        core = set(self.comfy_nodes.NODE_CLASS_MAPPINGS)
        self.loaded = await self.comfy_nodes.load_custom_node(
            str(self.link), core, module_parent="custom_nodes"
        )
        self.pack_nodes = sorted(set(self.comfy_nodes.NODE_CLASS_MAPPINGS) - core)

    def pack(self, module: str = "") -> Any:
        """A module of the pack as ComfyUI loaded it, e.g. `models.flux_fill`."""
        name = str(self.link).replace(".", "_x_")
        return importlib.import_module(f".{module}" if module else name, package=name)

    def new_executor(self):
        server = StubServer()
        parameters, kinds = (
            inspect.signature(self.execution.PromptExecutor).parameters,
            self.execution.CacheType,
        )
        sizes = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}  # main.py gives all that its version knows
        extra = {"cache_args": sizes} if "cache_args" in parameters else {"cache_size": 0}
        # the first ComfyUI calls the cache that keeps nothing by another name
        nothing = getattr(kinds, "NONE", getattr(kinds, "DEPENDENCY_AWARE", None))
        kind = kinds.CLASSIC if self.caches else nothing
        return self.execution.PromptExecutor(server, cache_type=kind, **extra)

    def graph(self) -> Graph:
        return Graph(self.nodes)

    def validate(self, prompt: dict) -> tuple[bool, Any, list, dict]:
        return asyncio.run(self.execution.validate_prompt("test", prompt, None))

    def run(self, graph: Graph | dict, *, may_fail: bool = False) -> Run:
        """Run a prompt in this case's executor (results stay cached between runs of one case)."""
        prompt = graph.prompt if isinstance(graph, Graph) else graph
        valid, error, outputs, node_errors = self.validate(prompt)
        assert valid, f"the prompt does not validate: {error} {json.dumps(node_errors, default=str)[:2000]}"
        if self.executor is None:
            self.executor = self.new_executor()
        self.executor.success = True
        self.executor.server.events.clear()
        KEPT.clear()
        self.executor.execute(prompt, "test", {"client_id": "tests"}, outputs)
        events = self.executor.server.events
        executed = [data["node"] for event, data in events if event == "executing" and data.get("node")]
        run = Run(
            executed, dict(KEPT), list(self.executor.status_messages), self.executor.history_result["outputs"]
        )
        assert may_fail or not run.error, (
            run.error + "\n" + "".join(run.message("execution_error")["traceback"])
        )
        return run


def run_cases(host: Host, ids: list[str], report) -> None:
    import comfy_cases

    comfy_cases.load_all()
    for case_id in ids:
        host.executor = None
        GIVEN.clear()
        outcome, detail = "passed", ""
        try:
            function, arguments = comfy_cases.find(case_id)
            function(host, *arguments)
        except comfy_cases.SkipCase as skip:
            outcome, detail = "skipped", str(skip)
        except Exception:
            outcome, detail = "failed", traceback.format_exc()
        report({"case": case_id, "outcome": outcome, "detail": detail})


def main() -> None:
    # Cases and ComfyUI may print: results travel on a copy of stdout, everything else goes to stderr.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def report(line: dict) -> None:
        results.write(json.dumps(line) + "\n")
        results.flush()

    ids = json.loads(sys.stdin.read())
    comfyui, base, *options = sys.argv[1:]
    host = Host(Path(comfyui), Path(base), options)
    report({"ready": True})
    with contextlib.suppress(BrokenPipeError):
        run_cases(host, ids, report)


if __name__ == "__main__":
    main()
