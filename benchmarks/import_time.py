"""Claim: importing the pack inside ComfyUI costs at most 20 ms beyond what ComfyUI has imported already.

Named peer: ComfyUI core (torch and its own nodes), timed in the same process. Run with ComfyUI's interpreter:

    python benchmarks/import_time.py /path/to/ComfyUI
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MS = 20.0


def measure(comfyui: Path) -> tuple[float, float, int]:
    """(seconds for ComfyUI's core, seconds for the pack on top, modules it added) in this fresh process."""
    os.chdir(comfyui)
    sys.path.insert(0, str(comfyui))
    start = time.perf_counter()
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import utils.extra_config  # noqa: F401  (before `nodes`, which hides the package of that name)

    import nodes  # noqa: F401

    core = time.perf_counter() - start
    modules = len(sys.modules)
    start = time.perf_counter()
    # as ComfyUI's loader does it: by path, under a name that is no identifier
    spec = importlib.util.spec_from_file_location(str(ROOT), ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[str(ROOT)] = module
    spec.loader.exec_module(module)
    return core, time.perf_counter() - start, len(sys.modules) - modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI")
    parser.add_argument("--runs", type=int, default=3, help="fresh processes; the best counts")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(*measure(options.comfyui.resolve()))
        return
    command = [sys.executable, __file__, str(options.comfyui), "--once"]
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for _ in range(options.runs)
    ]
    core, pack, modules = min(
        (tuple(map(float, text.split()[-3:])) for text in outputs), key=lambda row: row[1]
    )
    print(f"ComfyUI core      {core * 1000:8.1f} ms")
    print(f"pack on top of it {pack * 1000:8.1f} ms ({modules:.0f} modules), {pack / core:.2%} of core")
    print(f"limit {LIMIT_MS:.0f} ms: {'met' if pack * 1000 <= LIMIT_MS else 'NOT met'}")


if __name__ == "__main__":
    main()
