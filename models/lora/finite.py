"""No NaN and no infinity in a file's tensors, checked in one pass over its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from .errors import LoraError


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises LoraError naming the first tensor, of any shape, that holds NaN or infinity."""
    kept = {k: t for k, t in tensors.items() if t.is_floating_point() and t.numel()}
    # A sum is not finite if one element is not: one pass, no temporary. (Asking for a float32 result would be
    # nine times slower.) A sum that overflows float16 only leads to the slow check below.
    if all(_sum(run).isfinite() for run in _runs(kept.values())):
        return
    for key, tensor in kept.items():
        bad = int((~tensor.float().isfinite()).sum())
        if bad:
            raise LoraError(
                f"{name} holds NaN or infinite values ({key}: {bad} of {tensor.numel()}): "
                "its training diverged, use an earlier checkpoint"
            )


def _runs(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same elements in as few tensors as possible: those that fill one stretch of a file become one."""
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype), []).append(tensor)
    runs = []
    for group in groups.values():
        start = min(t.storage_offset() for t in group)
        size = max(t.storage_offset() + t.numel() for t in group) - start
        filled = size == sum(t.numel() for t in group) and all(t.is_contiguous() for t in group)
        runs.extend([group[0].as_strided((size,), (1,), start)] if filled else group)
    return runs


def _sum(tensor: Tensor) -> Tensor:
    if tensor.dtype.itemsize < 2:  # float8 has no sum
        tensor = tensor.float()
    return tensor.sum()
