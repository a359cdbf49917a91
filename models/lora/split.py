"""A change of a layer as the file has it, cut into those of the diffusers layers that it stands for.

Fused layers (qkv, linear1) have several; the final modulation has its two row halves the other way round.
"""

from __future__ import annotations

from dataclasses import replace

from . import names
from .based import Based, Share, Swapped
from .kinds import Factored, LowRank, swap_halves
from .layer import Layer
from .weights import Module


def split(layer: Layer, whole: Module) -> dict[str, Module]:
    """The change of each diffusers module that the file's layer stands for.

    Raises LoraError for rows that they cannot share.
    """
    first = layer.where[0]
    if first.part is None:
        return {first.path: _swapped(layer, whole) if first.swap else whole}
    out, width = whole.shape
    if out is None:  # turns the inputs, which all parts share
        return {target.path: whole for target in layer.where}
    spans = [names.part_rows(target.part, out, width) for target in layer.where]
    if out % 3 and len(spans) == 3 or any(start >= stop for start, stop in spans):
        raise layer.fail(f"has {out} outputs, which {len(spans)} layers cannot share: the file is damaged")
    blocks = _split_blocks(layer, whole, spans) if isinstance(whole, LowRank) else 1
    if blocks > 1:
        r = whole.rank // blocks
        scale, source = layer.scale(r)
        cut = [slice(i * r, (i + 1) * r) for i in range(blocks)]
        return {
            t.path: LowRank(whole.A[c], whole.B[slice(*s), c], scale, source)
            for t, s, c in zip(layer.where, spans, cut, strict=True)
        }
    return {t.path: _part(layer, whole, i, spans) for i, t in enumerate(layer.where)}


def _part(layer: Layer, whole: Module, i: int, spans: list[tuple[int, int]]) -> Module:
    start, stop = spans[i]
    if isinstance(whole, LowRank):
        return replace(whole, B=whole.B[start:stop])
    if isinstance(whole, Factored):
        return replace(whole, rows=(start, stop))
    cut = [whole.cut(*span) for span in spans]
    if all(part is not None for part in cut):
        return cut[i]
    members = tuple(target.path for target in layer.where)
    return Share(whole, members, i, tuple(stop - start for start, stop in spans))


def _swapped(layer: Layer, module: Module) -> Module:
    if module.shape[0] is not None and module.shape[0] % 2:
        raise layer.fail(f"has {module.shape[0]} outputs, which are no two halves: the file is damaged")
    if isinstance(module, LowRank):
        return replace(module, B=swap_halves(module.B))
    if isinstance(module, Factored):
        return replace(module, swap=True)
    if isinstance(module, Based):
        return Swapped(module)
    raise layer.fail("has experts on the final modulation: the file is damaged")


def _split_blocks(layer: Layer, whole: LowRank, spans: list[tuple[int, int]]) -> int:
    """kohya's `split_qkv` trains one LoRA per part and stores them block-sparse, alpha unchanged:
    the trained scale is alpha over one block's rank. Only believed if header and zeros agree."""
    n = len(spans)
    if not layer.rule.split_qkv or whole.rank % n:
        return 1
    r = whole.rank // n
    for i, (start, stop) in enumerate(spans):
        block = whole.B[start:stop]
        if block[:, : i * r].any() or block[:, (i + 1) * r :].any():
            return 1
    return n
