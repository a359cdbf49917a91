"""A Stable Diffusion finetune as an inpainting model: custom + inpainting - base, tensor by tensor.

What an inpainting checkpoint learnt over its base is added to a finetune of the same base (add difference).
The first layer, nine channels wide there and four here, is padded with zeros. Text encoder and VAE stay the
finetune's. Equal to core's merge nodes in ComfyUI (template `merge_inpaint`). Holds one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checkpoints
from .checkpoints import DENOISER, Opened

ENTRIES = ("input_blocks.0.0.weight", "conv_in.weight")  # the first layer in LDM's names, in diffusers'
WIDTHS = {"custom": 4, "inpaint": 9, "base": 4}
STALE = "model_ema."  # averaged weights beside the ones that are merged


def merge(
    custom: Path,
    inpaint: Path,
    base: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> None:
    """Write custom + inpaint - base as safetensors: computed in float32, stored as `dtype` or custom's own.

    Each is a checkpoint (.safetensors, or a pickle under weights_only) or a bare UNet. on_tensor(index,
    count) is called before each tensor. Raises ValueError naming the file that does not fit, before anything
    is written.
    """
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(checkpoints.opened(path))
            for name, path in {"custom": custom, "inpaint": inpaint, "base": base}.items()
        }
        prefixes = check(files)
        kept = [name for name in files["custom"].names() if not name.startswith(STALE)]
        entry = _entry(files["custom"], prefixes["custom"])
        plan = {}
        for name in kept:
            shape, stored = files["custom"].describe(name)
            if name == entry:
                shape = files["inpaint"].describe(_other(name, prefixes, "inpaint"))[0]
            plan[name] = (shape, dtype if dtype is not None and stored.is_floating_point else stored)

        def tensor(index: int, name: str) -> Tensor:
            if on_tensor is not None:
                on_tensor(index, len(plan))
            own = files["custom"].read(name)
            if name.startswith(prefixes["custom"]) and own.is_floating_point():
                found = (files[other].read(_other(name, prefixes, other)) for other in ("inpaint", "base"))
                own = added(own, *found)
            return own.to(plan[name][1])

        checkpoints.stream(output, plan, tensor)


def added(custom: Tensor, inpaint: Tensor, base: Tensor) -> Tensor:
    """inpaint - base + custom in float32; a narrower second axis is padded with zeros."""
    missing = inpaint.shape[1] - custom.shape[1] if custom.ndim > 1 else 0
    pad = [0, 0] * (custom.ndim - 2) + [0, missing]
    custom, base = (F.pad(x.float(), pad) if missing else x.float() for x in (custom, base))
    return inpaint.float() - base + custom


def check(files: dict[str, Opened]) -> dict[str, str]:
    """The prefix of the denoiser in each file. Raises ValueError unless the three fit together."""
    prefixes = {name: _prefix(file) for name, file in files.items()}
    for name, file in files.items():
        found, wanted = file.describe(_entry(file, prefixes[name]))[0][1], WIDTHS[name]
        if found != wanted:
            remedy = "an inpainting checkpoint" if wanted == 9 else "an ordinary checkpoint"
            if name == "custom" and found == 9:
                remedy = "a finetune of an ordinary one; this one inpaints already"
            raise ValueError(f"{name} {file.path} takes {found} input channels, not {wanted}: give {remedy}")
    layers = {name: _shapes(file, prefixes[name]) for name, file in files.items()}
    for name in ("inpaint", "base"):
        differ = {
            layer
            for layer in layers["custom"].keys() | layers[name].keys()
            if layers["custom"].get(layer) != layers[name].get(layer) and layer not in ENTRIES
        }
        if differ:
            raise ValueError(
                f"{name} {files[name].path} and custom {files['custom'].path} differ in {min(differ)} and "
                f"{len(differ) - 1} more layers: give three models of one kind, such as SD 1.5"
            )
    return prefixes


def _prefix(file: Opened) -> str:
    for prefix in (DENOISER, ""):
        if any(prefix + entry in file for entry in ENTRIES):
            return prefix
    raise ValueError(
        f"{file.path} holds no Stable Diffusion denoiser ({DENOISER}input_blocks.0.0.weight): give a full "
        "checkpoint, or the UNet's own file"
    )


def _entry(file: Opened, prefix: str) -> str:
    return next(prefix + entry for entry in ENTRIES if prefix + entry in file)


def _other(name: str, prefixes: dict[str, str], other: str) -> str:
    return prefixes[other] + name.removeprefix(prefixes["custom"])


def _shapes(file: Opened, prefix: str) -> dict[str, tuple[int, ...]]:
    return {n.removeprefix(prefix): file.describe(n)[0] for n in file.names() if n.startswith(prefix)}
