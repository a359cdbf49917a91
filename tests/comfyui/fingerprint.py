"""Has a node changed what it was given? Fingerprints of values between nodes, and a watch over nodes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import torch


def fingerprint(value: Any) -> str:
    """A digest of all a node could change in a value: tensors by content, models by weights and options."""
    digest = hashlib.sha256()
    for part in _parts(value, {}):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    # `seen` holds the values themselves: a temporary that died would give its id to another one
    yield type(value).__name__.encode()
    if isinstance(value, torch.Tensor):
        yield f"{tuple(value.shape)} {value.dtype}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, (str, int, float, bool, bytes, type(None), torch.dtype, torch.device)):
        yield repr(value).encode()
    elif id(value) in seen:
        return
    elif isinstance(value, dict):
        seen[id(value)] = value
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        seen[id(value)] = value
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, torch.nn.Module):
        yield from _parts(dict(value.state_dict()), seen)
    elif dataclasses.is_dataclass(value):
        seen[id(value)] = value
        yield from _parts(
            {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, seen
        )
    else:
        yield from _model_parts(value, seen)


def _model_parts(value: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    """ComfyUI's MODEL, CLIP and VAE: weights, patches, options and object patches."""
    seen[id(value)] = value
    for name in ("patcher", "model", "first_stage_model", "patches", "model_options", "object_patches"):
        if name in getattr(value, "__dict__", {}):
            yield name.encode()
            yield from _parts(getattr(value, name), seen)


@contextlib.contextmanager
def watch(classes: dict[str, type], changed: list[str]) -> Iterator[None]:
    """Check every call of these nodes; `changed` collects each `Node.input` that a call altered."""
    originals = {name: getattr(cls, cls.FUNCTION) for name, cls in classes.items()}

    def watching(name: str, function):
        @functools.wraps(function)
        def run(self, **inputs):
            before = {key: fingerprint(value) for key, value in inputs.items()}
            try:
                return function(self, **inputs)
            finally:
                changed.extend(f"{name}.{key}" for key in inputs if fingerprint(inputs[key]) != before[key])

        return run

    for name, cls in classes.items():
        setattr(cls, cls.FUNCTION, watching(name, originals[name]))
    try:
        yield
    finally:
        for name, cls in classes.items():
            setattr(cls, cls.FUNCTION, originals[name])
