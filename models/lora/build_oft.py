"""The rotations in a layer's tensors: LyCORIS' and kohya's `oft_blocks`, peft's `oft_R` and `boft_R`."""

from __future__ import annotations

from torch import Tensor

from .based import Swapped
from .layer import Layer
from .rotations import Boft, InputBoft, InputOft, Oft, skew_limit
from .weights import Module


def oft(layer: Layer) -> Oft | Boft | None:
    """LyCORIS' or kohya's rotation of the outputs, None without one. Raises LoraError for damaged blocks."""
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


def oft_by_parts(layer: Layer) -> dict[str, Module]:
    """kohya's `oft_blocks.0`, `.1`, `.2`: a rotation of its own for each part of a fused layer.

    Raises LoraError unless each part has its blocks.
    """
    blocks = [layer.take(f"oft_blocks.{i}", 3) for i in range(len(layer.where))]
    if any(b is None or b.shape[1] != b.shape[2] for b in blocks):
        raise layer.fail(f"has oft_blocks for other than its {len(layer.where)} parts: the file is damaged")
    made = {t.path: (t, _rotation(layer, b, None)) for t, b in zip(layer.where, blocks, strict=True)}
    return {path: Swapped(module) if target.swap else module for path, (target, module) in made.items()}


def peft_oft(layer: Layer) -> InputOft | None:
    """peft's OFT, None without one. Raises LoraError for a variant or a number of terms not known here."""
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


def peft_boft(layer: Layer) -> InputBoft | None:
    """peft's BOFT, None without one. Raises LoraError for factors that are no butterfly or incomplete."""
    if not {"boft_R", "boft_s"} & set(layer.parts):
        return None
    blocks, rescale = layer.take("boft_R", 4), layer.take("boft_s", 1, 2)
    if blocks is None or rescale is None:
        raise layer.fail("has only one of boft_R and boft_s: the file is incomplete")
    factors, count, size, other = blocks.shape
    if size != other or factors > 16 or (factors > 1 and (size % 2 or count % 2 ** (factors - 1))):
        raise layer.fail(f"has boft_R {list(blocks.shape)}, which is no butterfly: the file is damaged")
    return InputBoft(blocks, rescale.flatten())
