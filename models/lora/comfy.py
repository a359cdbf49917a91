"""A LoRA onto a clone of a ComfyUI MODEL: weight patches where a weight can hold it, run-time deltas else.

Weight patches use core's own adapter, so that offloading, fp8, GGUF and stacking behave as with core's
loader. What no weight can hold (experts routed per token, a sigma window) is added to the layers' outputs
during each model call: an APPLY_MODEL wrapper hangs forward hooks on the layers and takes them off again
before it returns, so the module that all clones share is never left changed. The run-time tensors live in a
ModelPatcher of their own, registered as an additional model: ComfyUI counts, loads and offloads them.

Imported only at run time, inside ComfyUI (0.3.64 or later).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Tensor, nn

from ...samplers import ddim
from .based import Based, Share, Swapped
from .comfy_layers import Layers, Target
from .delta import BiasDelta, Delta, WeightDelta, check_window, delta_for, in_window
from .fit import NO_SUCH_LAYER, base_notes, check_applicable, fit_module, refuse_if_nothing_fits
from .kinds import map_tensors
from .weights import Factored, FullTensor, LoraError, LoraWeights, LowRank, Module, MoeLowRank, Report


def apply_to_comfy(
    model: comfy.model_patcher.ModelPatcher,
    weights: LoraWeights,
    strength: float = 1.0,
    *,
    window: tuple[float, float] | str | None = "file",
) -> tuple[comfy.model_patcher.ModelPatcher, Report]:
    """Returns (clone of model with the LoRA, report); the model given is never changed.

    window: active only for start >= sigma > end (1 = noise); "file" takes the one stored in the LoRA, None
    means always. Raises LoraError when the LoRA does not fit this model.
    """
    check_applicable(weights, strength)
    window = check_window(weights.info.sigma_window if window == "file" else window)
    layers = Layers(model)
    fitted = _Fitted(layers, window, notes=list(weights.notes), skipped=list(weights.skipped))
    for path, module in weights.modules.items():
        fitted.add_module(path, module)
    for path, tensor in weights.full.items():
        fitted.add_whole(path, tensor)
    refuse_if_nothing_fits(weights, len(fitted.loaded), layers.model_name)
    notes = [*fitted.notes, *base_notes(weights.info, layers.inputs if layers.is_flux else None)]

    clone = model.clone()
    if strength:
        _add_patches(clone, fitted.patches, strength)
        if fitted.deltas:
            _attach(clone, list(fitted.deltas.values()), strength, window)
    report = Report(
        weights.name,
        weights.info,
        tuple(fitted.loaded),
        tuple(fitted.deltas),
        tuple(fitted.skipped),
        tuple(dict.fromkeys(notes)),
        window,
        strength,
    )
    return clone, report


@dataclass
class _Fitted:
    """A LoRA's changes sorted by how this model takes them: weight patches, or deltas while it runs.

    deltas: path in diffusers' naming -> (layer of the live model, its change).
    """

    layers: Layers
    window: tuple[float, float] | None
    notes: list[str]
    skipped: list[tuple[str, str]]
    loaded: list[str] = field(default_factory=list)
    patches: list[tuple[object, object]] = field(default_factory=list)
    deltas: dict[str, tuple[str, Delta]] = field(default_factory=dict)
    _fused: set[int] = field(default_factory=set)

    def add_module(self, path: str, module: Module) -> None:
        """A layer's change, once for all members of a fused one. Raises LoraError where sizes differ."""
        if (found := self.layers.find(path)) is None:
            self.skipped.append((path, NO_SUCH_LAYER))
            return
        target, layer = found
        out, width, *kernel = self.layers.shape(target, layer)
        mergeable = self.window is None and not isinstance(module, MoeLowRank)
        grows = mergeable and self.layers.is_flux
        module = fit_module(path, module, out, width, self.notes, kernel=tuple(kernel), may_grow=grows)
        self.loaded.append(path)
        if isinstance(module, Share):
            if id(module.inner) in self._fused:
                return
            self._fused.add(id(module.inner))
            module, target = module.inner, self.layers.fused(module)
        if mergeable:
            self.patches.append((_patch_key(target), _adapter(module, width)))
        else:
            self.deltas[path] = target[0].removesuffix(".weight"), _delta(module, target)

    def add_whole(self, path: str, tensor: FullTensor) -> None:
        """A whole parameter's change. Raises LoraError where sizes differ."""
        target = self.layers.parameter(path)
        if target is None:
            self.skipped.append((path, NO_SUCH_LAYER))
            return
        _check_whole(path, tensor, self.layers, target)
        self.loaded.append(path)
        layer = self.layers.find(path.rpartition(".")[0])
        if self.window is not None and layer is not None and hasattr(layer[1], "in_features"):
            self.deltas[path] = target[0].rpartition(".")[0], _whole_delta(tensor, target)
            return
        self.patches.append((_patch_key(target), _ChangeAdapter.of(tensor)))
        if self.window is not None:
            self.notes.append(f"{path} is no linear layer's: it stays active outside the sigma window")


def _add_patches(model, patches: list[tuple[object, object]], strength: float) -> None:
    """All patches in order; core takes a dict, so two for one weight need two."""
    while patches:
        batch, rest = {}, []
        for key, patch in patches:
            if key in batch:
                rest.append((key, patch))
            else:
                batch[key] = patch
        accepted = set(model.add_patches(batch, strength))
        if lost := [key for key in batch if key not in accepted]:
            raise LoraError(
                f"ComfyUI refused the patch of {lost[0]}: use the loader the model itself came from"
            )
        patches = rest


def _patch_key(target: Target):
    """As core's add_patches takes it: shorter forms are ordinary, the function only where it is needed."""
    key, rows, function = target
    if function is not None:
        return key, rows, function
    return key if rows is None else (key, rows)


def _adapter(module: Module, width: int) -> WeightAdapterBase:
    if isinstance(module, LowRank):
        grown = list(module.shape) if module.shape[1] > width and module.A.ndim == 2 else None
        # (up, down, alpha, mid, dora scale, reshape); core's strength is alpha / rank
        return LoRAAdapter(set(), (module.B, module.A, module.scale * module.rank, None, None, grown))
    return _ChangeAdapter.of(module)


class _ChangeAdapter(WeightAdapterBase):
    """Any change that is a function of the weight: LyCORIS, DoRA, OFT, whole tensors."""

    name = "diptych"

    def __init__(self, loaded_keys: set[str], weights: tuple) -> None:
        """As core makes and remakes adapters, with tensors it has moved; weights: the change, its tensors."""
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, module: Factored | Based | FullTensor) -> _ChangeAdapter:
        tensors: list[Tensor] = []
        map_tensors(module, lambda tensor: tensors.append(tensor) or tensor)
        return cls(set(), (module, *tensors))

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: object,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: object = None,
    ) -> Tensor:
        change, *tensors = self.weights
        moved = iter(tensors)
        module = map_tensors(change, lambda _: next(moved).to(weight.device))
        # the function exchanges two halves: the weight is read as diffusers has it, the change written back
        change = module.change(function(weight.float()))
        weight.copy_(weight.float() + function(strength * change))
        return weight


def _check_whole(path: str, tensor: FullTensor, layers: Layers, target: Target) -> None:
    live = comfy.utils.get_attr(layers.root, target[0]).shape
    live = live if target[1] is None else (target[1][2], *live[1:])
    if tuple(live) != tuple(tensor.value.shape):
        raise LoraError(
            f"the LoRA's {path} is {list(tensor.value.shape)}, the model's is {list(live)}: "
            "it was trained on another base model, load that one"
        )


def _whole_delta(tensor: FullTensor, target: Target) -> Delta:
    key, rows, function = target
    if function is not None:
        tensor = replace(tensor, value=function(tensor.value))
    rows = None if rows is None else (rows[1], rows[2])
    return BiasDelta(tensor, rows) if key.endswith(".bias") else WeightDelta(tensor, rows)


def _delta(module: Module, target: Target) -> Delta:
    _, rows, function = target
    if function is not None:  # core's only one exchanges the halves of the final modulation
        if isinstance(module, LowRank):
            module = replace(module, B=function(module.B))
        elif isinstance(module, MoeLowRank):
            module = replace(module, B=torch.stack([function(expert) for expert in module.B]))
        elif isinstance(module, Factored):
            module = replace(module, swap=not module.swap)
        else:
            module = Swapped(module)
    return delta_for(module, None if rows is None else (rows[1], rows[2]))


def _attach(
    model, deltas: list[tuple[str, Delta]], strength: float, window: tuple[float, float] | None
) -> None:
    bank = nn.ModuleList()
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    for _, delta in deltas:
        delta.strength = strength
        # what is multiplied out in float32 at each call keeps the file's type
        narrow = dtype.is_floating_point and dtype.itemsize > 1 and not isinstance(delta, WeightDelta)
        bank.append(delta.to(dtype) if narrow else delta)
    _refuse_compiled(model)
    key = f"diptych_lora_{uuid.uuid4().hex}"
    patcher = comfy.model_patcher.ModelPatcher(bank, model.load_device, model.offload_device)
    model.set_additional_models(key, [patcher])
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, _Runtime(deltas, window))


COMPILED = (
    "torch.compile keeps the layers of its first call, but this LoRA (a sigma window or experts) changes "
    "them from call to call: leave out the compile node, or the window"
)


def _refuse_compiled(model: comfy.model_patcher.ModelPatcher) -> None:
    """Raise LoraError if a node before this one compiles the model, whole or in parts."""
    wrapped = any("compile" in key for key in model.wrappers.get(WrappersMP.APPLY_MODEL, {}))
    if wrapped or any(hasattr(patch, "_orig_mod") for patch in model.object_patches.values()):
        raise LoraError(COMPILED)


class _Runtime:
    """The APPLY_MODEL wrapper: hooks on for one model call, off again whatever happens."""

    def __init__(self, deltas: list[tuple[str, Delta]], window: tuple[float, float] | None) -> None:
        self.deltas, self.window = deltas, window
        parts = [name.split(".") for name, _ in deltas]
        self.around = {".".join(part[: end + 1]) for part in parts for end in range(len(part))}

    def __call__(self, executor, x: Tensor, t: Tensor, *args, **kwargs):
        base = executor.class_obj
        if self._is_compiled(executor):  # by a node behind this one
            raise LoraError(COMPILED)
        if self.window is not None and not in_window(_sigma(base, t), self.window):
            return executor(x, t, *args, **kwargs)
        hooks = []
        try:
            for name, delta in self.deltas:
                layer = comfy.utils.get_attr(base, name)
                hooks.append(layer.register_forward_hook(_adding(delta)))
            return executor(x, t, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def _is_compiled(self, executor) -> bool:
        later = executor.wrappers[executor.idx :]  # core compiles in a wrapper of its own
        if any("compile" in getattr(wrapper, "__module__", "") for wrapper in later):
            return True
        base = executor.class_obj
        return any(hasattr(comfy.utils.get_attr(base, name), "_orig_mod") for name in self.around)


def _adding(delta: Delta):
    def add(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return delta(args[0], output, layer)

    return add


def _sigma(base, t: Tensor) -> float:
    """The noise level, 1 = noise, 0 = data, whatever the model counts in: a flow's sigma, or
    `ddim.noise_level` of an epsilon model's timestep."""
    sampling = base.model_sampling
    if isinstance(sampling, comfy.model_sampling.CONST):
        return float(t.flatten()[0])
    timesteps = {"num_train_timesteps": getattr(sampling, "num_timesteps", 1000)}
    return ddim.noise_level(float(sampling.timestep(t.flatten()[:1])), timesteps)
