"""`read(path_or_folder) -> LoraWeights`: any LoRA file in use, in one canonical form, checked.

Order of work: load (`files.py`), refuse what cannot be read honestly, sort keys into layers (`parse.py`,
`names.py`), build each layer's change (`build.py`), check for NaN. Every key ends up somewhere in
`LoraWeights`: `modules`, `full`, or `skipped` with the reason.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import about, files, names, parse
from .build import build
from .errors import LoraError
from .finite import check_finite
from .kinds import FullTensor, LowRank, swap_halves
from .layer import Layer
from .scale import ScaleRule, number, parse_json, scale_rule
from .weights import LoraWeights, Module

_TEXT = "text encoder weights: this loader changes the MODEL only, use core's Load LoRA for CLIP"
_FULL_CHECKPOINT_MIN = 20  # plain tensors without one LoRA key among them
_SATELLITES = frozenset(
    {"alpha", "scale", "dora_scale", "lora_magnitude_vector", "rescale", "reshape_weight"}
)
_WHOLE = (
    ("diff", "weight", "diff"),
    ("w_norm", "weight", "diff"),
    ("set_weight", "weight", "set"),
    ("diff_b", "bias", "diff"),
    ("b_norm", "bias", "diff"),
)


def read(path: str | Path, *, scale: float | None = None, top_k: int | None = None) -> LoraWeights:
    """Reads a LoRA file, or a folder as peft, diffusers or DanceGRPO leave it.

    scale: replaces the scale of every module (normally alpha / rank, see `scale.py` for where alpha is
    looked for). top_k: experts per token of a mixture, which ICEdit's files do not store (default 1).
    Raises LoraError (a ValueError) for damaged, quantised, NaN or unsupported files.
    """
    return canonical(files.load(path), scale=scale, top_k=top_k)


def canonical(raw: files.RawFile, *, scale: float | None = None, top_k: int | None = None) -> LoraWeights:
    """The canonical form of tensors already in memory."""
    parse.refuse_unsupported(raw.name, raw.tensors)
    _refuse_residuals(raw)
    return _Reader(raw, scale, top_k).result()


class _Reader:
    """The tables that fill up while a file is sorted; lives only as long as one `canonical` call."""

    def __init__(self, raw: files.RawFile, scale: float | None, top_k: int | None) -> None:
        self.raw, self.override = raw, scale
        self.ours = parse_json(raw.header.get("diptych")) or {}
        self.top_k, self.gate = (
            _top_k(top_k, self.ours, raw.name),
            str(self.ours.get("moe_gate", "softmax_topk")),
        )
        self.layers: dict[str, dict[str, Tensor]] = {}
        self.plain: dict[str, Tensor] = {}
        self.modules: dict[str, Module] = {}
        self.full: dict[str, FullTensor] = {}
        self.skipped: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.styles: set[str] = set()
        self.used: dict[str, Tensor] = {}
        config = raw.sidecars.get("adapter_config.json", {})
        self.biases_are_trained = config.get("bias") in ("all", "lora_only", "oft_only", "boft_only")

    def result(self) -> LoraWeights:
        self._sort()
        ranks = {t.shape[0] for p in self.layers.values() for r, t in p.items() if r[0] == "A" and t.ndim > 1}
        rule = scale_rule(self.raw.header, self.raw.sidecars, ranks, self.override)
        self.notes.extend(rule.notes)
        if "dora" not in self.styles and (says := [c.source for c in rule.configs if c.dora]):
            raise LoraError(
                f"{says[0]} says use_dora, but {self.raw.name} has no lora_magnitude_vector: "
                "the file is incomplete"
            )
        for layer, parts in self.layers.items():
            self._layer(layer, parts, rule)
        self._plain_tensors()
        if not self.modules and not self.full:
            raise LoraError(self._nothing_found())
        info = about.info(self.raw, self.ours, self.modules, self.full, self.styles, self.notes)
        if self.override is None and any("assumed" in m.scale_from for m in self.modules.values()):
            self.notes.append(
                "no alpha is stored with this file: scale 1 assumed, set the scale if it looks weak"
            )
        if "moe" in self.styles:
            self.notes.append(
                f"mixture of experts: gate {self.gate}, top_k {1 if self.top_k is None else self.top_k}"
            )
        if info.format != "full checkpoint":
            check_finite(self.raw.name, self.used)
        return LoraWeights(
            self.modules, self.full, info, tuple(self.skipped), tuple(self.notes), self.raw.name
        )

    # -- sorting keys ---------------------------------------------------------------------------------

    def _sort(self) -> None:
        sorted_keys = {key: parse.classify(key) for key in self.raw.tensors if not names.is_text_encoder(key)}
        adapter = self._adapter({part.adapter for part in sorted_keys.values() if part is not None})
        for key, tensor in self.raw.tensors.items():
            if key not in sorted_keys:
                self._skip(key, _TEXT)
                continue
            part = sorted_keys[key]
            if part is None:
                self.plain[key] = tensor
            elif part.adapter and part.adapter != adapter:
                self._skip(key, f"belongs to adapter {part.adapter!r}, not {adapter!r}")
            else:
                self._note_style(part, key, tensor)
                role = part.role if part.expert is None else f"{part.role}.{part.expert}"
                roles = self.layers.setdefault(part.layer, {})
                if role in roles and not torch.equal(roles[role], tensor):
                    raise LoraError(
                        f"{self.raw.name} has two different {role} of {part.layer}: the file is damaged"
                    )
                roles[role] = tensor
        for key in [k for k in self.plain if k.endswith(".scale") and self.plain[k].numel() == 1]:
            if (layer := key.removesuffix(".scale")) in self.layers:
                self.layers[layer]["scale"] = self.plain.pop(key)
        self._join_satellites()

    def _join_satellites(self) -> None:
        """An alpha or magnitude under another naming than its factors goes to them."""
        owners: dict[tuple, list[str]] = {}
        lonely = []
        for layer, parts in self.layers.items():
            if set(parts) <= _SATELLITES:
                lonely.append(layer)
            else:
                owners.setdefault(names.targets(*names.strip(layer)), []).append(layer)
        for layer in lonely:
            found = owners.get(names.targets(*names.strip(layer)), [])
            if len(found) == 1 and not set(self.layers[layer]) & set(self.layers[found[0]]):
                self.layers[found[0]] |= self.layers.pop(layer)

    def _adapter(self, found: set[str]) -> str:
        found.discard("")
        if len(found) > 1 and "default" not in found:
            raise LoraError(
                f"{self.raw.name} holds several adapters ({', '.join(sorted(found)[:9])}), none named "
                "default: save the one you want to a file of its own"
            )
        return "default" if "default" in found else next(iter(found), "")

    def _note_style(self, part: parse.Part, key: str, tensor: Tensor) -> None:
        layer, flat = names.strip(part.layer)
        if part.role.startswith("router"):
            self.styles.add("moe")
        elif ".processor.qkv" in layer or ".processor.proj" in layer:
            self.styles.add("xlabs")
        elif flat:
            self.styles.add("kohya" if key.startswith(("lora_unet", "oft_unet")) else "underscored")
        elif layer.startswith(("double_blocks.", "single_blocks.")):
            self.styles.add("bfl")
        style = parse.STYLES.get(part.role) or parse.STYLES.get(part.role.partition("_")[0])
        if style is not None:
            self.styles.add("boft" if style == "oft" and tensor.ndim == 4 else style)

    # -- one layer ------------------------------------------------------------------------------------

    def _layer(self, name: str, parts: dict[str, Tensor], rule: ScaleRule) -> None:
        bare, flat = names.strip(name)
        where = names.targets(bare, flat) if bare else ()
        if not where:
            for role in parts:
                self._skip(f"{bare}.{role}", "no known layer has this name")
            return
        self.used.update({f"{name}.{role}": t for role, t in parts.items()})
        layer = Layer(
            self.raw.name,
            bare,
            where,
            dict(parts),
            rule,
            self.top_k,
            self.gate,
            self.raw.sidecars.get("adapter_config.json"),
            constraint_per_output=flat,
        )
        for role, param, mode in _WHOLE:
            if role in layer.parts:
                self._whole(where, param, FullTensor(layer.take(role), mode))
        bias = layer.take("B_bias", 1)
        made = build(layer)
        for path, module in made.items():
            self._put(path, module)
        if bias is not None:
            scale = next(iter(made.values())).scale if made else 1.0
            self._whole(where, "bias", FullTensor(bias.float() * scale, "diff"))
        for role in layer.parts:
            self._skip(f"{name}.{role}", "means nothing beside the rest of this layer's tensors")

    def _put(self, path: str, module: Module) -> None:
        """Two namings of one layer may meet in a file: the same change counts once, others add up."""
        before = self.modules.get(path)
        if before is None:
            self.modules[path] = module
        elif not isinstance(before, LowRank) or not isinstance(module, LowRank):
            raise LoraError(
                f"{self.raw.name} holds two changes of {path} that cannot be added up: save one of them alone"
            )
        elif _same(before, module):
            self.notes.append("some layers are stored twice, under two namings: each counts once")
        elif before.A.shape[1:].numel() != module.A.shape[1:].numel() or len(before.B) != len(module.B):
            raise LoraError(
                f"{self.raw.name} holds two changes of {path} of different sizes: the file is damaged"
            )
        else:
            self.modules[path] = _added(before, module)
            self.notes.append("some layers have two changes, under two namings: they are added up")

    def _whole(self, where, param: str, tensor: FullTensor) -> None:
        width = tensor.value.shape[1] if tensor.value.ndim > 1 else None
        for target in where:
            value = _rows(tensor.value, target, width) if tensor.value.ndim else tensor.value
            path, new = f"{target.path}.{param}", FullTensor(value, tensor.mode)
            old = self.full.get(path)
            if old is not None and not (old.mode == new.mode and torch.equal(old.value, new.value)):
                if old.value.shape != value.shape or "set" in (old.mode, new.mode):
                    raise LoraError(f"{self.raw.name} holds two different {path}: save one of them alone")
                new = FullTensor(old.value.float() + value.float(), "diff")
            self.full[path] = new

    # -- plain parameters -----------------------------------------------------------------------------

    def _plain_tensors(self) -> None:
        is_checkpoint = not self.modules and len(self.plain) >= _FULL_CHECKPOINT_MIN
        if is_checkpoint:
            self.styles.add("full checkpoint")
        for key, tensor in self.plain.items():
            name, flat = names.strip(key) if len(key) <= parse.LONGEST_KEY else ("", False)
            name = name.replace(".modules_to_save.default", "").replace(".modules_to_save", "")
            trained_bias = name.endswith(".bias") and self.biases_are_trained
            if ".base_layer." in name and not is_checkpoint and not trained_bias:
                self._skip(key, "the base model's own weights, stored beside the LoRA")
                continue
            layer, _, param = name.replace(".base_layer.", ".").rpartition(".")
            where = names.targets(layer, flat) if layer and param in ("weight", "bias", "scale") else ()
            if not where or not tensor.is_floating_point() or not (self.modules or is_checkpoint):
                self._skip(key, "not a LoRA tensor of any known format")
                continue
            if not is_checkpoint:
                self.used[key] = tensor
            self._whole(where, "weight" if param == "scale" else param, FullTensor(tensor, "set"))

    def _skip(self, key: str, why: str) -> None:
        self.skipped.append((key if len(key) <= 200 else key[:200] + "...", why))

    def _nothing_found(self) -> str:
        keys = list(self.raw.tensors)
        if keys and all(names.is_text_encoder(k) for k in keys):
            if not any(parse.classify(k) for k in keys):
                return f"{self.raw.name} is a text encoder, not a LoRA: load it with Load CLIP"
            return f"{self.raw.name} holds text encoder weights only: use core's Load LoRA for CLIP"
        shown = ", ".join(k[:80] for k in keys[:2]) if keys else "nothing"
        return f"{self.raw.name} holds no LoRA known here (its keys: {shown}): check that it is a LoRA file"


def _refuse_residuals(raw: files.RawFile) -> None:
    """peft's initialisations that move part of the base weights into the factors: no change of that base."""
    start = str(raw.sidecars.get("adapter_config.json", {}).get("init_lora_weights")).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise LoraError(
            f"{raw.name} was begun with {start[:20]}, so its factors hold a part of the base's own weights: "
            "save it with peft's path_initial_model_for_weight_conversion"
        )


def _top_k(asked: int | None, ours: dict, name: str) -> int | None:
    stored = ours.get("moe_top_k") if asked is None else asked
    value = number(stored, f"moe_top_k in the header of {name}")
    if value is not None and value != int(value):
        raise LoraError(f"top_k is {value:g} but must be a whole number of experts")
    return None if value is None else int(value)


def _same(a: LowRank, b: LowRank) -> bool:
    return a.scale == b.scale and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y) for x, y in ((a.A, b.A), (a.B, b.B))
    )


def _added(a: LowRank, b: LowRank) -> LowRank:
    """The sum of two changes: their ranks side by side, each with its own scale."""
    down = torch.cat([a.A.float().flatten(1), b.A.float().flatten(1)])
    up = torch.cat([a.scale * a.B.float().flatten(1), b.scale * b.B.float().flatten(1)], dim=1)
    shape = max(a.A.shape[1:], b.A.shape[1:], key=len)
    up = up.reshape(*up.shape, *(1,) * (len(shape) - 1))
    source = a.scale_from if a.scale_from == b.scale_from else f"{a.scale_from}; {b.scale_from}"
    return replace(a, A=down.reshape(-1, *shape), B=up, scale=1.0, scale_from=source)


def _rows(tensor: Tensor, target: names.Target, width: int | None) -> Tensor:
    """The rows of a (possibly fused) layer's tensor that belong to this target, in diffusers' order."""
    if target.part is not None:
        start, stop = names.part_rows(target.part, tensor.shape[0], width)
        return tensor[start:stop]
    return swap_halves(tensor) if target.swap else tensor
