"""A LoRA onto a diffusers module: plain parts through peft, experts and LyCORIS through forward hooks, whole
tensors and changes that depend on the weight (DoRA, OFT, ...) by rewriting the weight (`overwrite.py`).

`handle.unpatch()` takes all of it off again. Imports peft when first used. ComfyUI's side is `comfy.py`.
"""

from __future__ import annotations

import re
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import overwrite
from .based import Dora, Share
from .delta import Delta, check_window, delta_for, in_window
from .fit import NO_SUCH_LAYER, base_notes, check_applicable, fit_module, refuse_if_nothing_fits
from .weights import Based, FullTensor, LoraError, LoraInfo, LoraWeights, LowRank, Module, Report


@dataclass
class Applied:
    """A LoRA on a module: change its strength, follow sigma, take it off. adapter is peft's name for it."""

    module: nn.Module
    report: Report
    adapter: str
    window: tuple[float, float] | None = None
    strength: float = 1.0
    _plain: dict[str, float] = field(default_factory=dict)
    _deltas: list[Delta] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list)
    _written: list[tuple[str, overwrite.Writer]] = field(default_factory=list)
    _active: float = 0.0

    def set_strength(self, strength: float) -> None:
        """Sets the strength; rewritten weights are computed again, the rest is one number per layer."""
        self.strength = strength
        self._activate(strength)

    def at_sigma(self, sigma: float) -> None:
        """Call before each denoising step: on inside the window, off outside."""
        self._activate(self.strength if in_window(sigma, self.window) else 0.0)

    def unpatch(self) -> None:
        """Takes the LoRA off: the module is as it was before."""
        self._activate(0.0)
        while self._undo:
            self._undo.pop()()
        self._plain, self._deltas, self._written = {}, [], []

    def _activate(self, strength: float) -> None:
        if strength == self._active:
            return
        for path, scale in self._plain.items():
            self.module.get_submodule(path).scaling[self.adapter] = scale * strength
        for delta in self._deltas:
            delta.strength = strength
        for name, writer in self._written:
            overwrite.set_strength(self.module, name, writer, strength)
        self._active = strength

    def __str__(self) -> str:
        return str(self.report)


def apply_to_diffusers(
    module: nn.Module,
    weights: LoraWeights,
    strength: float = 1.0,
    *,
    window: tuple[float, float] | str | None = "file",
    trainable: bool = False,
) -> Applied:
    """Puts a LoRA onto a diffusers model (FluxTransformer2DModel, UNet2DConditionModel, ...), in place.

    window: (start, end] in sigma for `handle.at_sigma`; "file" takes the one stored in the LoRA.
    trainable: leave the peft factors requiring gradients (the base is frozen by peft's injection either way
    only for the layers it wraps; requires_grad of all other parameters is left as it was).
    Raises LoraError before anything is touched when the LoRA does not fit.
    """
    check_applicable(weights, strength)
    window = check_window(weights.info.sigma_window if window == "file" else window)
    fitting, full, notes, skipped = fit_all(module, weights)
    parameters = _parameters(module)
    plain = {p: c for p, c in fitting.items() if isinstance(c, LowRank)}
    written = {
        p: c for p, c in fitting.items() if isinstance(c, Based) and _is_writable(parameters[f"{p}.weight"])
    }
    hooked = {p: c for p, c in fitting.items() if p not in plain and p not in written}
    report = Report(
        weights.name,
        weights.info,
        tuple([*fitting, *full]),
        tuple(hooked),
        tuple(skipped),
        tuple(dict.fromkeys(notes)),
        window,
        strength,
    )
    handle = Applied(module, report, f"diptych_{uuid.uuid4().hex[:8]}", window)
    try:
        if plain:
            _inject(handle, plain, trainable)
        for path, change in hooked.items():
            members = change.members if isinstance(change, Share) else ()
            layers = [_base(module.get_submodule(name)) for name in members]
            _hook(handle, _base(module.get_submodule(path)), delta_for(change, members=layers))
        for path, change in written.items():
            _write(handle, f"{path}.weight", parameters, weight_change(change, module, parameters))
        for path, tensor in full.items():
            _write(handle, path, parameters, tensor.change)
        handle.set_strength(strength)
    except BaseException:
        handle.unpatch()
        raise
    return handle


def fit_all(
    module: nn.Module, weights: LoraWeights
) -> tuple[dict[str, Module], dict[str, FullTensor], list[str], list[tuple[str, str]]]:
    """(changes by path, whole tensors by path, notes, skipped): what of a LoRA this module takes.

    Raises LoraError when it was made for another model.
    """
    layers, parameters = dict(module.named_modules()), _parameters(module)
    notes, skipped = list(weights.notes), list(weights.skipped)
    fitting: dict[str, Module] = {}
    for path, change in weights.modules.items():
        layer = _base(layers.get(path))
        if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
            skipped.append((path, NO_SUCH_LAYER))
        elif isinstance(change, Share) and not set(change.members) <= set(layers):
            skipped.append((path, "the layers it shares its change with are not all there"))
        else:
            out, width, *kernel = _shape(layer)
            fitting[path] = fit_module(path, change, out, width, notes, kernel=tuple(kernel))
    full = _fitting_tensors(weights, parameters, skipped)
    refuse_if_nothing_fits(weights, len(fitting) + len(full), type(module).__name__)
    embedder = _base(layers.get("x_embedder"))
    notes.extend(base_notes(weights.info, getattr(embedder, "in_features", None)))
    return fitting, full, notes, skipped


def weight_change(
    change: Module, module: nn.Module, parameters: dict[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    """A function of a layer's weight: its float32 change; a `Share` reads the others' original weights."""
    if not isinstance(change, Share):
        return change.change
    names = [f"{member}.weight" for member in change.members]

    def among(weight: Tensor) -> Tensor:
        weights = [overwrite.original(module, name, parameters[name]) for name in names]
        weights[change.index] = weight
        return change.change_among(weights)

    return among


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {p.replace(".base_layer.", "."): t for p, t in module.named_parameters()}


def _is_writable(parameter: Tensor) -> bool:
    """Whether a weight holds plain numbers fine enough to be rewritten; else it is added to at run time."""
    plain = parameter.is_floating_point() and parameter.dtype.itemsize > 1 and not parameter.is_meta
    return plain and type(parameter) is nn.Parameter


def _write(
    handle: Applied, name: str, parameters: dict[str, Tensor], change: Callable[[Tensor], Tensor]
) -> None:
    writer = overwrite.add(handle.module, name, parameters[name], change)
    handle._written.append((name, writer))
    handle._undo.append(lambda: overwrite.remove(handle.module, name, writer))


def _inject(handle: Applied, plain: dict[str, LowRank], trainable: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    module, name = handle.module, handle.adapter
    wanted = {p: t.requires_grad for p, t in module.named_parameters()}
    active = getattr(module, "peft_config", None)
    config = LoraConfig(
        r=next(iter(plain.values())).rank,
        lora_alpha=1,
        # a text is matched whole; names in a list also match the tails of longer ones
        target_modules="|".join(re.escape(path) for path in plain),
        rank_pattern={f"^{re.escape(path)}": c.rank for path, c in plain.items()},
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        # a second LoRA is meant; peft warns of any second adapter
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, module, adapter_name=name)
    handle._undo.append(lambda: _eject(module, name, list(plain), had_config=active is not None))
    for path, change in plain.items():
        layer = module.get_submodule(path)
        if name not in layer.lora_A or layer.r[name] != change.rank:
            raise LoraError(
                f"peft did not place {path} at rank {change.rank}: update peft, or report this file"
            )
        base = layer.get_base_layer().weight
        dtype = base.dtype if base.dtype.is_floating_point and base.dtype.itemsize > 1 else torch.bfloat16
        for factor, value in ((layer.lora_A[name], change.A), (layer.lora_B[name], change.B)):
            value = value.reshape(factor.weight.shape).to(base.device, torch.float32 if trainable else dtype)
            factor.weight = nn.Parameter(value.clone(), requires_grad=trainable)
        layer.scaling[name] = 0.0
        handle._plain[path] = change.scale
    for layer in module.modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "_active_adapter"):
            layer._active_adapter = list(layer.lora_A.keys())
    for path, parameter in module.named_parameters():
        before = wanted.get(path, wanted.get(path.replace(".base_layer.", ".")))
        if before is not None:
            parameter.requires_grad_(before)


def _eject(module: nn.Module, name: str, paths: list[str], had_config: bool) -> None:
    for path in paths:
        layer = module.get_submodule(path)
        if not hasattr(layer, "delete_adapter"):
            continue
        layer.delete_adapter(name)
        if not layer.lora_A:
            parent, _, child = path.rpartition(".")
            parent = module.get_submodule(parent)
            base = layer.get_base_layer()
            if isinstance(parent, nn.ModuleList | nn.Sequential):
                parent[int(child)] = base
            else:
                setattr(parent, child, base)
    if hasattr(module, "peft_config"):
        module.peft_config.pop(name, None)
        if not module.peft_config and not had_config:
            del module.peft_config


def _hook(handle: Applied, layer: nn.Module, delta: Delta) -> None:
    delta.requires_grad_(False)
    delta.strength = 0.0

    def add(layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if delta.strength == 0.0:
            return output
        delta.to(args[0].device)
        return delta(args[0], output, layer)

    handle._deltas.append(delta)
    handle._undo.append(layer.register_forward_hook(add).remove)


def _fitting_tensors(weights: LoraWeights, parameters: dict, skipped: list) -> dict[str, FullTensor]:
    full = {}
    for path, tensor in weights.full.items():
        if path not in parameters:
            skipped.append((path, NO_SUCH_LAYER))
        elif parameters[path].shape != tensor.value.shape:
            raise LoraError(
                f"the LoRA's {path} is {list(tensor.value.shape)}, "
                f"the model's is {list(parameters[path].shape)}: "
                "it was trained on another base model, load that one"
            )
        else:
            full[path] = tensor
    return full


def _base(layer: nn.Module | None) -> nn.Module | None:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _shape(layer: nn.Module) -> tuple[int, ...]:
    if hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.shape) if layer.weight.ndim > 1 else (layer.weight.shape[0], 0)


def from_peft(module: nn.Module, adapter: str = "default", info: LoraInfo | None = None) -> LoraWeights:
    """The canonical form of a peft adapter living on a model (for saving after training).

    Raises LoraError if there is none of that name.
    """
    modules = {}
    for path, layer in module.named_modules():
        if hasattr(layer, "lora_A") and adapter in getattr(layer, "lora_A", {}):
            A, B = (getattr(layer, ab)[adapter].weight.detach().cpu() for ab in ("lora_A", "lora_B"))
            change: Module = LowRank(A, B, float(layer.scaling[adapter]), "peft")
            if adapter in (magnitudes := getattr(layer, "lora_magnitude_vector", {})):
                change = Dora(change, magnitudes[adapter].weight.detach().cpu().flatten())
            modules[path.removeprefix("base_model.model.")] = change
    if not modules:
        raise LoraError(f"the model carries no peft adapter named {adapter!r}: name the one that was trained")
    ranks = [m.rank for m in modules.values()]
    first = next(iter(modules.values()))
    known = info or LoraInfo("peft", rank=max(ranks), alpha=first.scale * first.rank, alpha_from="peft")
    return LoraWeights(modules, {}, known)
