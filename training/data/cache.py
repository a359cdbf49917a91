"""A cache of text embeddings and latents in safetensors shards, keyed by content.

The key is a hash of what was encoded (pixels or text), of its size and of the encoder: a cached value can
therefore never be paired with another prompt or image, whatever the order of the data, and never outlives
a change of encoder. (Caches indexed by step, as in diffusers' Kontext DreamBooth script, mix prompts and
images from the second epoch on.)

Shards are written atomically and hold their own keys, so there is no index that could disagree with them: a
killed run loses at most the shard it was collecting, and the next one encodes only what is missing.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from ..runtime import disk

SHARD_BYTES = 256 << 20


def _digest(*parts: bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()[:40]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def text_key(text: str, fingerprint: str) -> str:
    """Key of a text's embedding by the encoder with that `fingerprint`."""
    return _digest(b"text", fingerprint.encode(), text.encode())


def image_key(image: torch.Tensor, fingerprint: str, *more: torch.Tensor) -> str:
    """Key of an image's latents: its pixels, shape and dtype, and those of whatever else was encoded with it
    (a mask).
    """
    parts = [b"image", fingerprint.encode()]
    for tensor in (image, *more):
        parts += [repr((tuple(tensor.shape), str(tensor.dtype))).encode(), _bytes(tensor)]
    return _digest(*parts)


def fingerprint(*modules: torch.nn.Module | str, sample: int = 4096) -> str:
    """A short hash of encoders: class, tensor names, shapes, dtypes and the first `sample` values of every
    tensor.

    Strings (a tokenizer's folder, a maximum length, "mode" or "sample") are hashed as they are.
    """
    parts = []
    for module in modules:
        if isinstance(module, str):
            parts.append(module.encode())
            continue
        parts.append(type(module).__name__.encode())
        for name, tensor in module.state_dict().items():
            parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            parts.append(_bytes(tensor.flatten()[:sample]))
    return _digest(*parts)[:16]


class ContentCache:
    """Key -> named tensors, in `folder/*.safetensors`.

    `put` collects; `flush` (called by itself every `shard_bytes`) writes one shard. Reading is
    memory-mapped. Several processes may write to one folder: each sees the others' shards after `refresh()`.
    """

    def __init__(self, folder: str | Path, *, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pending: dict[str, dict[str, torch.Tensor]] = {}
        self._pending_bytes = 0
        self._put, self._put_bytes = 0, 0  # all that this object was given
        self._where: dict[str, dict[str, Path]] = {}
        self._handles: dict[Path, object] = {}
        self._known: set[Path] = set()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._where or key in self._pending

    def __len__(self) -> int:
        return len(self._where.keys() | self._pending.keys())

    def __getstate__(self) -> dict:
        # Memory maps do not travel to DataLoader workers: they reopen their own.
        return {**self.__dict__, "_handles": {}}

    def refresh(self) -> None:
        """Take note of shards written since, by this or another process; an unreadable shard is left out and
        redone.
        """
        from safetensors import SafetensorError

        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._known:
                continue
            try:
                names = list(self._open(path).keys())
            except (OSError, SafetensorError):
                continue
            self._known.add(path)
            for name in names:
                key, _, tensor = name.partition("/")
                self._where.setdefault(key, {})[tensor] = path

    def _open(self, path: Path):
        if path not in self._handles:
            from safetensors import safe_open

            self._handles[path] = safe_open(path, framework="pt", device="cpu")
        return self._handles[path]

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors stored under `key`, by name; KeyError when absent."""
        if key in self._pending:
            return dict(self._pending[key])
        return {name: self._open(path).get_tensor(f"{key}/{name}") for name, path in self._where[key].items()}

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Store named tensors (copied to the CPU, dtype kept). A key already there is left as it is."""
        if key in self:
            return
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self._pending[key] = copies
        size = sum(tensor.nbytes for tensor in copies.values())
        self._pending_bytes += size
        self._put, self._put_bytes = self._put + 1, self._put_bytes + size
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def check_room(self, more: int) -> None:
        """Raise ValueError where `more` entries of the mean size so far find no room on the disk."""
        if self._put:
            need = self._pending_bytes + more * self._put_bytes // self._put
            disk.check_room(self.folder, need, f"the cache of {more + len(self)} entries in {self.folder}")

    def flush(self) -> None:
        """Write what is pending as one shard: to a temporary name, synced, then renamed into place."""
        if not self._pending:
            return
        from safetensors.torch import save_file

        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            save_file(
                {f"{key}/{n}": t for key, group in self._pending.items() for n, t in group.items()}, partial
            )
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except Exception as error:
            partial.unlink(missing_ok=True)
            if not disk.failed_write(error):
                raise
            raise ValueError(
                f"the cache cannot write to {self.folder} ({error}): free space or choose another cache_dir"
            ) from error
        self._pending, self._pending_bytes = {}, 0
        self.refresh()

    def fill(
        self,
        items: Iterable[tuple[str, object]],
        encode: Callable[[list], list[dict[str, torch.Tensor]]],
        *,
        batch_size: int = 1,
        wrap: Callable[[Sequence[int]], Iterable[int]] = iter,
    ) -> int:
        """Encode what is missing among `items` (key, value), in batches; returns how many were encoded.

        `encode(values)` returns one dict of tensors per value; each key is encoded once. `wrap` may show
        progress: it is given the batches' starts. What was encoded is kept even when it is interrupted.
        """
        missing = {key: value for key, value in items if key not in self}
        keys = list(missing)
        try:
            for start in wrap(range(0, len(keys), batch_size)):
                some = keys[start : start + batch_size]
                for key, tensors in zip(some, encode([missing[key] for key in some]), strict=True):
                    self.put(key, tensors)
                if start == 0:
                    self.check_room(len(keys) - len(some))
        finally:
            self.flush()
        return len(keys)
