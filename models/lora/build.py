"""One layer's tensors, as a file has them, to its change in canonical form.

Each builder takes what it understands out of `parts`; what is left there afterwards is reported by `read.py`.
Shapes are checked here, so that nothing later can fail for the file's sake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import names
from .based import Based, Dora, Glora, Share, Swapped
from .errors import LoraError
from .kinds import Factored, LowRank, MoeLowRank, swap_halves
from .moe import GATES
from .rotations import Boft, InputBoft, InputOft, Oft, skew_limit
from .scale import ScaleRule
from .weights import Module

LARGEST = 2**28  # elements that folding a Tucker kernel may make; FLUX's largest matrix has a fifth of it


@dataclass
class Layer:
    """A layer's name in the file, the diffusers modules it stands for, and its tensors by role.

    constraint_per_output: trainers limit OFT's rotation by alpha times outputs, core ComfyUI by alpha.
    """

    file: str
    name: str
    where: tuple[names.Target, ...]
    parts: dict[str, Tensor]
    rule: ScaleRule
    top_k: int | None = None
    gate: str = "softmax_topk"
    peft: dict | None = None
    constraint_per_output: bool = True
    alpha: float | None = None
    stated: float | None = None

    def scale(self, rank: int | None) -> tuple[float, str]:
        """The scale of a change of this rank and where it came from; None: a LoKr with whole factors."""
        if self.stated is not None and self.rule.override is None:
            return self.stated, ".scale in the file"
        return self.rule.of((self.name, self.where[0].path), rank, self.alpha)

    def fail(self, what: str) -> LoraError:
        return LoraError(f"{self.file}: {self.name} {what}")

    def take(self, role: str, *dims: int) -> Tensor | None:
        """Removes a role's tensor and returns it; dims: how many dimensions it may have."""
        tensor = self.parts.pop(role, None)
        if tensor is None:
            return None
        if not tensor.is_floating_point():
            raise self.fail(f"stores {role} as {tensor.dtype}: it is quantised or damaged, get the original")
        if dims and (tensor.ndim not in dims or 0 in tensor.shape):
            raise self.fail(f"has {role} of shape {list(tensor.shape)}: the file is damaged")
        return tensor

    def number(self, role: str) -> float | None:
        """The value of a one-element tensor; None if there is none."""
        tensor = self.parts.pop(role, None)
        if tensor is None:
            return None
        if tensor.numel() != 1 or tensor.is_complex() or not tensor.double().isfinite():
            raise self.fail(
                f"has {role} {list(tensor.shape)}, which is not one finite number: the file is damaged"
            )
        return float(tensor.double())


def build(layer: Layer) -> dict[str, Module]:
    """Diffusers path -> change, for all that the layer's parts hold. Raises LoraError where they disagree."""
    layer.alpha, layer.stated = layer.number("alpha"), layer.number("scale")
    layer.parts.pop("reshape_weight", None)  # says the layer grows; the factors' own shape says it too
    if any(role.startswith("oft_blocks.") for role in layer.parts):
        return _split_oft(layer)
    found = [whole for make in _KINDS if (whole := make(layer)) is not None]
    if len(found) > 1:
        raise layer.fail("holds changes of two kinds: keep one of them")
    if not found:
        return {}
    return _split(layer, _with_magnitude(layer, found[0]))


# -- kinds ----------------------------------------------------------------------------------------------


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


def _oft(layer: Layer) -> Oft | Boft | None:
    blocks = layer.take("oft_blocks", 3, 4)
    blocks = layer.take("oft_diag", 3) if blocks is None else blocks
    if blocks is None:
        return None
    if blocks.shape[-1] != blocks.shape[-2]:
        raise layer.fail(f"has oft_blocks {list(blocks.shape)}, which are not square: the file is damaged")
    return _rotation(layer, blocks, layer.take("rescale", 1, 2, 4))


def _rotation(layer: Layer, blocks: Tensor, rescale: Tensor | None) -> Oft | Boft:
    outputs = blocks.shape[-3] * blocks.shape[-1]
    if rescale is not None:
        if rescale.numel() != outputs:
            raise layer.fail(f"has rescale {list(rescale.shape)} for {outputs} outputs: the file is damaged")
        rescale = rescale.flatten()
    constraint = (layer.alpha or 0.0) * (outputs if layer.constraint_per_output else 1)
    if blocks.ndim == 3:
        return Oft(blocks, skew_limit(blocks, constraint), rescale)
    factors, size = blocks.shape[0], blocks.shape[-1]
    if factors > 16 or size % 2 or outputs % (2 ** (factors - 1) * size):
        raise layer.fail(f"has oft_blocks {list(blocks.shape)}, which is no butterfly: the file is damaged")
    return Boft(blocks, skew_limit(blocks, constraint), rescale)


def _split_oft(layer: Layer) -> dict[str, Module]:
    """kohya's `oft_blocks.0`, `.1`, `.2`: a rotation of its own for each part of a fused layer."""
    blocks = [layer.take(f"oft_blocks.{i}", 3) for i in range(len(layer.where))]
    if any(b is None or b.shape[1] != b.shape[2] for b in blocks):
        raise layer.fail(f"has oft_blocks for other than its {len(layer.where)} parts: the file is damaged")
    made = {t.path: (t, _rotation(layer, b, None)) for t, b in zip(layer.where, blocks, strict=True)}
    return {path: Swapped(module) if target.swap else module for path, (target, module) in made.items()}


def _peft_oft(layer: Layer) -> InputOft | None:
    upper = layer.take("oft_R", 2)
    if upper is None:
        return None
    size = int((1 + (1 + 8 * upper.shape[1]) ** 0.5) / 2)
    config = layer.peft or {}
    if size * (size - 1) // 2 != upper.shape[1] or config.get("coft"):
        raise layer.fail(f"has oft_R {list(upper.shape)} of a kind of OFT not known here: merge it with peft")
    exact = config.get("use_cayley_neumann") is False
    terms = config.get("num_cayley_neumann_terms", 5)
    if not isinstance(terms, int) or not 1 <= terms <= 64:
        raise layer.fail(f"has num_cayley_neumann_terms {terms!r} in its config: give a number from 1 to 64")
    return InputOft(upper, size, None if exact else terms, config.get("block_share") is True)


def _peft_boft(layer: Layer) -> InputBoft | None:
    if not {"boft_R", "boft_s"} & set(layer.parts):
        return None
    blocks, rescale = layer.take("boft_R", 4), layer.take("boft_s", 1, 2)
    if blocks is None or rescale is None:
        raise layer.fail("has only one of boft_R and boft_s: the file is incomplete")
    factors, count, size, other = blocks.shape
    if size != other or factors > 16 or (factors > 1 and (size % 2 or count % 2 ** (factors - 1))):
        raise layer.fail(f"has boft_R {list(blocks.shape)}, which is no butterfly: the file is damaged")
    return InputBoft(blocks, rescale.flatten())


_KINDS: tuple[Callable[[Layer], Module | None], ...] = (
    _experts,
    _low_rank,
    _lokr,
    _loha,
    _glora,
    _oft,
    _peft_oft,
    _peft_boft,
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


# -- parts of fused layers ------------------------------------------------------------------------------


def _split(layer: Layer, whole: Module) -> dict[str, Module]:
    """The change of each diffusers module that the file's layer stands for."""
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
