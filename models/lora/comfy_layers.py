"""Which parameter of a ComfyUI model a diffusers path is. Imported only inside ComfyUI."""

from __future__ import annotations

from collections.abc import Callable

import comfy.lora
import comfy.model_patcher
import comfy.utils
from torch import Tensor, nn

from .based import Share
from .errors import LoraError

# a weight's key, the rows of it (dim, start, length), a function on the change: as core's key map has it
Target = tuple[str, tuple[int, int, int] | None, Callable[[Tensor], Tensor] | None]


class Layers:
    """Which parameter of this ComfyUI model a diffusers path is, from core's own LoRA key map."""

    def __init__(self, model: comfy.model_patcher.ModelPatcher) -> None:
        self.root = model.model
        self.model_name = type(self.root).__name__
        inner = getattr(self.root, "diffusion_model", None)
        if "nunchaku" in type(inner).__module__.lower() or "Nunchaku" in type(inner).__name__:
            raise LoraError("the model is a Nunchaku (SVDQuant) model: use Nunchaku's own LoRA loader for it")
        self.map = comfy.lora.model_lora_keys_unet(self.root, {})
        self.found: dict[str, tuple[Target, nn.Module] | None] = {}

    def find(self, path: str) -> tuple[Target, nn.Module] | None:
        """The target of a module path and the layer it lies in; None if the model has no such layer."""
        if path not in self.found:
            hit = self.map.get(f"transformer.{path}") or self.map.get(f"lora_unet_{path.replace('.', '_')}")
            hit = hit or self.map.get(f"diffusion_model.{path}")
            target = None if hit is None else _as_target(hit)
            layer = None if target is None else self._get(target[0].removesuffix(".weight"))
            self.found[path] = (target, layer) if layer is not None else None
        return self.found[path]

    def parameter(self, path: str) -> Target | None:
        """The target of one parameter, rows and half-swap included."""
        layer, _, leaf = path.rpartition(".")
        found = self.find(layer)
        if found is not None:
            target = found[0]
            key = target[0] if leaf == "weight" else target[0].removesuffix(".weight") + f".{leaf}"
            target = (key, *target[1:])
        else:  # norms have no `.weight`: core maps them as whole names
            hit = _norm_key(path)
            target = None if hit is None else (hit, None, None)
        return target if target is not None and self._get(target[0]) is not None else None

    def fused(self, share: Share) -> Target:
        """The rows of the live layer that a change of several diffusers layers covers together.

        Raises LoraError where they are not one layer.
        """
        found = [self.find(member) for member in share.members]
        targets = [f[0] for f in found if f is not None]
        starts = [t[1][1] if t[1] else None for t in targets]
        sizes = [t[1][2] if t[1] else None for t in targets]
        if (
            len(targets) != len(share.members)
            or tuple(sizes) != share.sizes
            or len({t[0] for t in targets}) > 1
        ):
            raise LoraError(
                f"the layers {', '.join(share.members)} are not one layer here: load a FLUX model"
            )
        return targets[0][0], (0, starts[0], sum(sizes)), None

    @staticmethod
    def shape(target: Target, layer: nn.Module) -> tuple[int, ...]:
        """(outputs, inputs, kernel...) of the target, from the layer: a GGUF tensor's shape is its bytes'."""
        if hasattr(layer, "in_features"):
            out, *rest = layer.out_features, layer.in_features
        else:
            out, *rest = layer.weight.shape
        return (out if target[1] is None else target[1][2]), *(rest or [0])

    @property
    def inputs(self) -> int | None:
        """Of the first layer: 64, 128 or 384 features of a token."""
        found = self.find("x_embedder")
        return None if found is None else self.shape(*found)[1]

    @property
    def is_flux(self) -> bool:
        """Whether the model has FLUX's layers, and names for them in diffusers' way."""
        return "diffusion_model.img_in" in self.map and "transformer.x_embedder" in self.map

    def _get(self, name: str):
        try:
            return comfy.utils.get_attr(self.root, name)
        except AttributeError:
            return None


def _as_target(hit) -> Target:
    if isinstance(hit, str):
        return hit, None, None
    return hit[0], hit[1], hit[2] if len(hit) > 2 else None


def _norm_key(path: str) -> str | None:
    names = {"norm_q": "query_norm", "norm_k": "key_norm"}
    added = {"norm_added_q": "query_norm", "norm_added_k": "key_norm"}
    kind, _, rest = path.partition(".")
    number, _, rest = rest.partition(".")
    leaf = rest.removeprefix("attn.").removesuffix(".weight")
    if kind == "transformer_blocks" and leaf in names | added:
        side = "img" if leaf in names else "txt"
        return f"diffusion_model.double_blocks.{number}.{side}_attn.norm.{(names | added)[leaf]}.scale"
    if kind == "single_transformer_blocks" and leaf in names:
        return f"diffusion_model.single_blocks.{number}.norm.{names[leaf]}.scale"
    return None
