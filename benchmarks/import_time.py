"""Claim: importing the pack inside ComfyUI costs at most 1 % of what ComfyUI's own imports take.

Processor time, which other programs on the machine disturb least; a share, since machines differ (the same
commit takes 17 ms on one and 23 ms on another). Named peer: ComfyUI core (torch and its nodes), in the same
process. Run with ComfyUI's interpreter:

    python benchmarks/import_time.py /path/to/ComfyUI
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.01


def load_pack() -> None:
    """Import the pack as ComfyUI's loader does: by path, under a name that is no identifier."""
    for name in [name for name in sys.modules if name.startswith(str(ROOT))]:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location(str(ROOT), ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[str(ROOT)] = module
    spec.loader.exec_module(module)


def measure(comfyui: Path, runs: int) -> tuple[float, list[float], int]:
    """(seconds for ComfyUI's core, seconds for the pack on top, `runs` times, modules it added)."""
    os.chdir(comfyui)
    sys.path.insert(0, str(comfyui))
    start = time.process_time()
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import utils.extra_config  # noqa: F401  (before `nodes`, which hides the package of that name)

    import nodes  # noqa: F401

    core, modules, pack = time.process_time() - start, len(sys.modules), []
    for _ in range(runs):
        start = time.process_time()
        load_pack()
        pack.append(time.process_time() - start)
    return core, pack, len(sys.modules) - modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI")
    parser.add_argument(
        "--runs", type=int, default=9, help="imports; the best counts, for other work interferes"
    )
    options = parser.parse_args()
    core, pack, modules = measure(options.comfyui.resolve(), options.runs)
    best = min(pack) * 1000
    print(f"ComfyUI core      {core * 1000:8.1f} ms")
    print(f"pack on top of it {best:8.1f} ms ({modules} modules; first time {pack[0] * 1000:.1f} ms)")
    ratio = best / 1000 / core
    print(f"ratio {ratio:.2%}; limit {LIMIT:.0%}: {'met' if ratio <= LIMIT else 'NOT met'}")


if __name__ == "__main__":
    main()
