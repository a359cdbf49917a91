"""A layer's tensors to its change in canonical form: LoRA, experts, LyCORIS factors, GLoRA; DoRA of these.

Each builder takes what it understands out of `parts`; what is left there afterwards is reported by `read.py`.
Shapes are checked here, so that nothing later can fail for the file's sake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .based import Dora, Glora
from .build_oft import oft, oft_by_parts, peft_boft, peft_oft
from .errors import LoraError
from .kinds import Factored, LowRank, MoeLowRank
from .layer import Layer
from .moe import GATES
from .split import split
from .weights import Module

LARGEST = 2**28  # elements that folding a Tucker kernel may make; FLUX's largest matrix has a fifth of it


def build(layer: Layer) -> dict[str, Module]:
    """Diffusers path -> change, for all that the layer's parts hold. Raises LoraError where they disagree."""
    layer.alpha, layer.stated = layer.number("alpha"), layer.number("scale")
    layer.parts.pop("reshape_weight", None)  # says the layer grows; the factors' own shape says it too
    if any(role.startswith("oft_blocks.") for role in layer.parts):
        return oft_by_parts(layer)
    found = [whole for make in _KINDS if (whole := make(layer)) is not None]
    if len(found) > 1:
        raise layer.fail("holds changes of two kinds: keep one of them")
    if not found:
        return {}
    return split(layer, _with_magnitude(layer, found[0]))


def _low_rank(layer: Layer) -> LowRank | None:
    if not {"A", "B"} & set(layer.parts):
        return None
    A, B, mid = layer.take("A", 2, 3, 4), layer.take("B", 2, 3, 4), layer.take("mid", 4)
    if A is None or B is None:
        here, missing = ("A", "B") if B is None else ("B", "A")
        raise layer.fail(f"has a lora_{here} but no lora_{missing}: the file is incomplete")
    if mid is not None:  # Tucker form of a convolution: the middle kernel folds into A
        if mid.shape[:2] != (B.shape[1], A.shape[0]) or mid.shape[2:].numel() * A.numel() > LARGEST:
            raise layer.fail(
                f"has lora_mid {list(mid.shape)} for lora_A {list(A.shape)}: the file is damaged"
            )
        A = torch.einsum("o s h w, s i -> o i h w", mid.float(), A.float().flatten(1))
    if A.shape[0] != B.shape[1] or B.shape[2:].numel() != 1:
        raise layer.fail(
            f"has lora_A {list(A.shape)} and lora_B {list(B.shape)}, "
            "whose ranks do not meet: the file is damaged"
        )
    scale, source = layer.scale(A.shape[0])
    return LowRank(A, B, scale, source)


def _experts(layer: Layer) -> MoeLowRank | None:
    numbered = [role for role in layer.parts if role.startswith(("A.", "B."))]
    if not numbered and "router" not in layer.parts:
        return None
    numbers = sorted({int(role.partition(".")[2]) for role in numbered})
    if numbers != list(range(len(numbers))) or len(numbered) != 2 * len(numbers):
        raise layer.fail(f"has incomplete experts ({numbers[:8]}): the file is damaged")
    router = layer.take("router", 2)
    lists = {ab: [layer.take(f"{ab}.{i}", 2) for i in numbers] for ab in "AB"}
    if router is None or not numbers or len(layer.where) != 1 or layer.where[0].swap:
        raise layer.fail("has experts but no lora_route: the file is incomplete")
    if any(len({t.shape for t in tensors}) > 1 for tensors in lists.values()):
        raise layer.fail("has experts of different shapes: the file is damaged")
    A, B = torch.stack(lists["A"]), torch.stack(lists["B"])
    if router.shape != (len(numbers), A.shape[2]) or B.shape[2] != A.shape[1]:
        raise layer.fail(
            f"has router {list(router.shape)}, lora_A {list(A.shape)}, lora_B {list(B.shape)}, "
            "which do not fit each other: the file is damaged"
        )
    top_k = 1 if layer.top_k is None else layer.top_k
    if not 1 <= top_k <= len(numbers):
        raise LoraError(
            f"top_k is {top_k} but {layer.file} has {len(numbers)} experts: choose 1 to {len(numbers)}"
        )
    if layer.gate not in GATES:
        raise LoraError(
            f"{layer.file} was trained with the gate {layer.gate!r}, which is none of {', '.join(GATES)}"
        )
    scale, source = layer.scale(A.shape[1])
    return MoeLowRank(A, B, router, scale, source, layer.gate, top_k)


def _lokr(layer: Layer) -> Factored | None:
    f = _factors(layer, "lokr_", ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
    if not f:
        return None
    used: dict[str, Tensor] = {}
    for w in ("w1", "w2"):
        needed = (w,) if w in f else (f"{w}_a", f"{w}_b", *(("t2",) if w == "w2" and "t2" in f else ()))
        if not set(needed) <= set(f):
            raise layer.fail(f"has only {', '.join(sorted(f))} of a lokr: the file is incomplete")
        used |= {n: f[n] for n in needed}
        if w not in f and _product(*(f[n] for n in needed)) is None:
            raise _unlike(layer, "lokr", f)
    if used.get("w1", used.get("w1_b")).ndim != 2:
        raise _unlike(layer, "lokr", f)
    layer.parts.update({f"lokr_{n}": f[n] for n in f.keys() - used.keys()})  # both forms: reported
    whole = Factored("lokr", used)
    # LyCORIS scales by alpha / rank only where a factor was itself decomposed.
    scale, source = layer.scale(None if "w1" in used and "w2" in used else whole.rank)
    return replace(whole, scale=scale, scale_from=source)


def _loha(layer: Layer) -> Factored | None:
    f = _factors(layer, "hada_", ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
    if not f:
        return None
    if not {"w1_a", "w1_b", "w2_a", "w2_b"} <= set(f) or ("t1" in f) != ("t2" in f):
        raise layer.fail(f"has only {', '.join(sorted(f))} of a loha: the file is incomplete")
    first, second = (_product(f[f"w{i}_a"], f[f"w{i}_b"], f.get(f"t{i}")) for i in "12")
    if first is None or first != second:
        raise _unlike(layer, "loha", f)
    scale, source = layer.scale(f["w1_b"].shape[0])
    return Factored("loha", f, scale, source)


def _product(a: Tensor, b: Tensor, core: Tensor | None = None) -> tuple[int, ...] | None:
    """The shape of `a b`, or of the Tucker product with core; None where they do not fit each other."""
    if core is not None:
        meet = a.ndim == b.ndim == 2 and core.shape[:2] == (a.shape[0], b.shape[0])
        return (a.shape[1], b.shape[1], *core.shape[2:]) if meet else None
    return (a.shape[0], *b.shape[1:]) if a.ndim == 2 and a.shape[1] == b.shape[0] else None


def _unlike(layer: Layer, kind: str, factors: dict[str, Tensor]) -> LoraError:
    shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in factors.items())
    return layer.fail(f"has {kind} factors that do not fit each other ({shapes}): the file is damaged")


def _factors(layer: Layer, prefix: str, known: tuple[str, ...]) -> dict[str, Tensor]:
    kernels = ("t1", "t2")
    roles = [n for n in known if f"{prefix}{n}" in layer.parts]
    return {n: layer.take(f"{prefix}{n}", *((3, 4, 5) if n in kernels else (2, 3, 4))) for n in roles}


def _glora(layer: Layer) -> Glora | None:
    if not {"a1", "a2", "b1", "b2"} & set(layer.parts) or "bm" in layer.parts:
        return None
    parts = [layer.take(role, 2, 4) for role in ("a1", "a2", "b1", "b2")]
    if any(t is None for t in parts):
        raise layer.fail("has only some of a1, a2, b1, b2 of a GLoRA: the file is incomplete")
    a1, a2, b1, b2 = parts
    old = a1.shape[0] == a2.shape[1] == b1.shape[0] == b2.shape[1]
    new = a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]
    left, right, up, down = (a2, a1, b2, b1) if old and (not new or _square(a2, b2)) else (a1, a2, b1, b2)
    ranks = {left.shape[1], right.shape[0], up.shape[1], down.shape[0]}
    if not (old or new) or len(ranks) > 1 or left.shape[0] != right.shape[1]:
        raise layer.fail(f"has GLoRA factors of shapes {[list(t.shape) for t in parts]}: the file is damaged")
    scale, source = layer.scale(right.shape[0])
    return Glora(left, right, up, down, scale, source)


def _square(a2: Tensor, b2: Tensor) -> bool:
    """Where rank, inputs and outputs are all alike core ComfyUI reads the older form."""
    return a2.shape[0] == b2.shape[0] == a2.shape[1]


_KINDS: tuple[Callable[[Layer], Module | None], ...] = (
    _experts,
    _low_rank,
    _lokr,
    _loha,
    _glora,
    oft,
    peft_oft,
    peft_boft,
)


def _with_magnitude(layer: Layer, module: Module) -> Module:
    """A DoRA where a magnitude lies beside the factors (`dora_scale`, peft's `lora_magnitude_vector`)."""
    magnitude = layer.take("dora_scale", 1, 2, 4)
    by_peft = layer.take("lora_magnitude_vector", 1, 2, 4)
    magnitude = by_peft if magnitude is None else magnitude
    if magnitude is None:
        return module
    if not isinstance(module, LowRank | Factored) or "wd_for_diff" in layer.parts:
        raise layer.fail(
            "has a DoRA scale on what is no plain LoRA, LoHa or LoKr: merge it with its own library"
        )
    out, width = module.shape
    by_output = magnitude.numel() == out and (
        magnitude.ndim == 1 or magnitude.shape[0] == out or by_peft is not None
    )
    if not by_output and magnitude.numel() != width:
        raise layer.fail(
            f"has a DoRA scale {list(magnitude.shape)} for {width} -> {out}: the file is damaged"
        )
    return Dora(module, magnitude.flatten(), by_output)
