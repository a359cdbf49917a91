"""`read(path_or_folder) -> LoraWeights`: any LoRA file in use, in one canonical form, checked.

Order of work: load (`files.py`), refuse what cannot be read honestly, sort keys into layers (`parse.py`,
`names.py`), settle each layer's scale (`scale.py`), split fused layers, check for NaN. Every key ends up in
`modules`, `full` or `skipped`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from . import describe, files, names, parse
from .scale import ScaleRule, parse_json, scale_rule
from .weights import Factored, FullTensor, LoraError, LoraInfo, LoraWeights, LowRank, MoeLowRank

_TEXT = "text encoder weights: this loader changes the MODEL only, use core's Load LoRA for CLIP"
_FULL_CHECKPOINT_MIN = 20  # plain tensors without one LoRA key among them


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
    rule = scale_rule(raw.header, raw.adapter_config, raw.lora_config, scale)
    return _Reader(raw, rule, top_k).result()


class _Reader:
    """The tables that fill up while a file is sorted; lives only as long as one `canonical` call."""

    def __init__(self, raw: files.RawFile, rule: ScaleRule, top_k: int | None) -> None:
        self.raw, self.rule = raw, rule
        self.ours = parse_json(raw.header.get("diptych")) or {}
        self.top_k = top_k if top_k is not None else self.ours.get("moe_top_k")
        self.gate = self.ours.get("moe_gate", "softmax_topk")
        self.layers: dict[tuple[str, bool], dict[str, Tensor]] = {}
        self.plain: dict[str, Tensor] = {}
        self.modules: dict = {}
        self.full: dict[str, FullTensor] = {}
        self.skipped: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.styles: set[str] = set()
        self.used: dict[str, Tensor] = {}

    def result(self) -> LoraWeights:
        self._sort()
        for (layer, flat), parts in self.layers.items():
            self._layer(layer, flat, parts)
        self._plain_tensors()
        if not self.modules and not self.full:
            raise LoraError(self._nothing_found())
        info = self._info()
        if info.format != "full checkpoint":
            files.check_finite(self.raw.name, self.used)
        return LoraWeights(
            self.modules, self.full, info, tuple(self.skipped), tuple(self.notes), self.raw.name
        )

    # -- sorting keys ---------------------------------------------------------------------------------

    def _sort(self) -> None:
        sorted_keys = {key: parse.classify(key) for key in self.raw.tensors if not names.is_text_encoder(key)}
        adapter = self._adapter({part.adapter for part in sorted_keys.values() if part is not None})
        for key, tensor in self.raw.tensors.items():
            if key not in sorted_keys:
                self.skipped.append((key, _TEXT))
                continue
            part = sorted_keys[key]
            if part is None:
                self.plain[key] = tensor
            elif part.adapter and part.adapter != adapter:
                self.skipped.append((key, f"belongs to adapter {part.adapter!r}, not {adapter!r}"))
            else:
                layer, flat = names.strip(part.layer)
                self._note_style(layer, flat, part, key)
                role = part.role if part.expert is None else f"{part.role}.{part.expert}"
                self.layers.setdefault((layer, flat), {})[role] = tensor

    def _adapter(self, found: set[str]) -> str:
        found.discard("")
        if len(found) > 1 and "default" not in found:
            raise LoraError(
                f"{self.raw.name} holds several adapters ({', '.join(sorted(found))}), none named default: "
                "save the one you want to a file of its own"
            )
        return "default" if "default" in found else next(iter(found), "")

    def _note_style(self, layer: str, flat: bool, part: parse.Part, key: str) -> None:
        if part.role.startswith("router"):
            self.styles.add("moe")
        elif ".processor.qkv" in layer or ".processor.proj" in layer:
            self.styles.add("xlabs")
        elif flat:
            self.styles.add("kohya" if key.startswith("lora_unet") else "underscored")
        elif layer.startswith(("double_blocks.", "single_blocks.")):
            self.styles.add("bfl")
        if part.role.startswith("lokr"):
            self.styles.add("lokr")
        elif part.role.startswith("hada"):
            self.styles.add("loha")

    # -- one layer ------------------------------------------------------------------------------------

    def _layer(self, layer: str, flat: bool, parts: dict[str, Tensor]) -> None:
        where = names.targets(layer, flat)
        if not where:
            self.skipped.extend((f"{layer}.{role}", "no known layer has this name") for role in parts)
            return
        self.used.update({f"{layer}.{role}": t for role, t in parts.items()})
        alpha = parts.pop("alpha", None)
        alpha = None if alpha is None else float(alpha)
        parts.pop("reshape_weight", None)  # says the layer grows; the factors' own shape says it too
        if any("." in role for role in parts) or "router" in parts:
            self._experts(layer, where, parts, alpha)
        elif "A" in parts or "B" in parts:
            self._low_rank(layer, where, parts, alpha)
        elif any(role.startswith(("lokr_", "hada_")) for role in parts):
            self._factored(layer, where, parts, alpha)
        for role, param, mode in (
            ("diff", "weight", "diff"),
            ("w_norm", "weight", "diff"),
            ("set_weight", "weight", "set"),
            ("diff_b", "bias", "diff"),
            ("b_norm", "bias", "diff"),
        ):
            if role in parts:
                self._whole(where, param, FullTensor(parts[role], mode))

    def _low_rank(self, layer: str, where, parts: dict[str, Tensor], alpha: float | None) -> None:
        if "A" not in parts or "B" not in parts:
            here, missing = ("A", "B") if "A" in parts else ("B", "A")
            raise LoraError(
                f"{self.raw.name}: {layer} has a lora_{here} but no lora_{missing}: the file is incomplete"
            )
        A, B = parts["A"], parts["B"]
        if "mid" in parts:  # Tucker form of a convolution: the middle kernel folds into A
            A = torch.einsum("o s h w, s i -> o i h w", parts["mid"].float(), A.float().flatten(1)).to(
                A.dtype
            )
        rank = A.shape[0]
        if A.ndim not in (2, 4) or B.ndim < 2 or B.shape[1] != rank:
            raise LoraError(
                f"{self.raw.name}: {layer} has lora_A {list(A.shape)} and lora_B {list(B.shape)}, "
                "whose ranks do not meet: the file is damaged"
            )
        blocks = self._split_blocks(where, B)
        scale, source = self.rule.of((layer, where[0].path), rank // blocks, alpha)
        for target in where:
            a, b = A, _rows(B, target, A.shape[1])
            if blocks > 1:
                i, n = target.part
                a, b = A[i * rank // n : (i + 1) * rank // n], b[:, i * rank // n : (i + 1) * rank // n]
            self.modules[target.path] = LowRank(a, b, scale, source)
        if "B_bias" in parts:
            self._whole(where, "bias", FullTensor(parts["B_bias"].float() * scale, "diff"))

    def _split_blocks(self, where, B: Tensor) -> int:
        """kohya's `split_qkv` trains one LoRA per part and stores them block-sparse, alpha unchanged:
        the trained scale is alpha over one block's rank. Only believed if header and zeros agree."""
        n = len(where)
        if n == 1 or not self.rule.split_qkv or B.shape[1] % n:
            return 1
        r = B.shape[1] // n
        for i, target in enumerate(where):
            block = _rows(B, target, B.shape[0] // 7 if n == 4 else None)
            if block[:, : i * r].any() or block[:, (i + 1) * r :].any():
                return 1
        return n

    def _experts(self, layer: str, where, parts: dict[str, Tensor], alpha: float | None) -> None:
        numbers = sorted({int(role.split(".")[1]) for role in parts if "." in role})
        lists = {ab: [parts.get(f"{ab}.{i}") for i in numbers] for ab in "AB"}
        if numbers != list(range(len(numbers))) or any(t is None for ts in lists.values() for t in ts):
            raise LoraError(
                f"{self.raw.name}: the experts of {layer} are incomplete ({numbers}): the file is damaged"
            )
        if "router" not in parts or len(where) != 1:
            raise LoraError(f"{self.raw.name}: {layer} has experts but no lora_route: the file is incomplete")
        A, B, router = torch.stack(lists["A"]), torch.stack(lists["B"]), parts["router"]
        top_k = 1 if self.top_k is None else int(self.top_k)
        if not 1 <= top_k <= len(numbers):
            raise LoraError(
                f"top_k is {top_k} but {self.raw.name} has {len(numbers)} experts: choose 1 to {len(numbers)}"
            )
        if router.shape != (len(numbers), A.shape[2]) or B.shape[2] != A.shape[1]:
            raise LoraError(
                f"{self.raw.name}: {layer} has router {list(router.shape)}, lora_A {list(A.shape)}, "
                f"lora_B {list(B.shape)}, which do not fit each other: the file is damaged"
            )
        scale, source = self.rule.of((layer, where[0].path), A.shape[1], alpha)
        self.modules[where[0].path] = MoeLowRank(A, B, router, scale, source, self.gate, top_k)

    def _factored(self, layer: str, where, parts: dict[str, Tensor], alpha: float | None) -> None:
        kind = "lokr" if any(role.startswith("lokr_") for role in parts) else "loha"
        roles = {
            role.partition("_")[2]: t for role, t in parts.items() if role.startswith(("lokr_", "hada_"))
        }
        rank = None
        if kind == "lokr":
            factors = {}
            for w in ("w1", "w2"):
                if w in roles:
                    factors[w] = roles[w]
                elif f"{w}_a" in roles and f"{w}_b" in roles:
                    rank = roles[f"{w}_b"].shape[0]
                    factors[w] = (roles[f"{w}_a"].float() @ roles[f"{w}_b"].float().flatten(1)).to(
                        roles[f"{w}_a"].dtype
                    )
        else:
            factors = {w: roles[w] for w in ("w1_a", "w1_b", "w2_a", "w2_b") if w in roles}
            rank = roles["w1_b"].shape[0] if "w1_b" in roles else None
        if len(factors) != (2 if kind == "lokr" else 4):
            raise LoraError(
                f"{self.raw.name}: {layer} has only {', '.join(sorted(roles))} of a {kind}: "
                "the file is incomplete"
            )
        # LyCORIS scales by alpha / rank only where a factor was itself decomposed.
        scale, source = (
            (1.0, "lokr with whole factors: 1") if rank is None else self.rule.of((layer,), rank, alpha)
        )
        if self.rule.override is not None:
            scale, source = self.rule.override, "override"
        whole = Factored(kind, factors, scale, source)
        for target in where:
            if target.swap:
                self.skipped.append((layer, f"{kind} on the final modulation is not supported"))
                continue
            rows = None if target.part is None else names.part_rows(target.part, *whole.shape)
            self.modules[target.path] = Factored(kind, factors, scale, source, rows)

    def _whole(self, where, param: str, tensor: FullTensor) -> None:
        for target in where:
            width = tensor.value.shape[1] if tensor.value.ndim > 1 else None
            value = _rows(tensor.value, target, width)
            self.full[f"{target.path}.{param}"] = FullTensor(value, tensor.mode)

    # -- plain parameters -----------------------------------------------------------------------------

    def _plain_tensors(self) -> None:
        is_checkpoint = not self.modules and len(self.plain) >= _FULL_CHECKPOINT_MIN
        if is_checkpoint:
            self.styles.add("full checkpoint")
        for key, tensor in self.plain.items():
            name, flat = names.strip(key)
            name = name.replace(".modules_to_save.default", "").replace(".modules_to_save", "")
            if ".base_layer." in name and not is_checkpoint:
                self.skipped.append((key, "the base model's own weights, stored beside the LoRA"))
                continue
            layer, _, param = name.replace(".base_layer.", ".").rpartition(".")
            where = names.targets(layer, flat) if param in ("weight", "bias", "scale") else ()
            if not where or not (self.modules or is_checkpoint):
                self.skipped.append((key, "not a LoRA tensor of any known format"))
                continue
            if not is_checkpoint:
                self.used[key] = tensor
            self._whole(where, "weight" if param == "scale" else param, FullTensor(tensor, "set"))

    # -- what the file says about itself --------------------------------------------------------------

    def _info(self) -> LoraInfo:
        ranks = Counter(m.rank for m in self.modules.values())
        sources = Counter(m.scale_from for m in self.modules.values())
        rank = ranks.most_common(1)[0][0] if ranks else None
        scales = Counter(m.scale for m in self.modules.values())
        alpha = scales.most_common(1)[0][0] * rank if rank else None
        alpha = self.ours.get("alpha", alpha)
        window = self.ours.get("sigma_window")
        if len(ranks) > 1:
            self.notes.append(
                "ranks: " + ", ".join(f"{n} modules of rank {r}" for r, n in sorted(ranks.items()))
            )
        if self.rule.override is None and any("assumed" in s for s in sources):
            self.notes.append(
                "no alpha is stored with this file: scale 1 assumed, set the scale if it looks weak"
            )
        if self.is_moe():
            self.notes.append(
                f"mixture of experts: gate {self.gate}, top_k {1 if self.top_k is None else self.top_k}"
            )
        return LoraInfo(
            format=describe.format_name(self.raw, self.styles),
            base=self.ours.get("base") or describe.guess_base(self.modules, self.full),
            rank=rank,
            alpha=alpha,
            alpha_from=", ".join(sources),
            algorithm=self.ours.get("algorithm"),
            reward=_text(self.ours.get("reward")),
            step=self.ours.get("step", (self.raw.lora_config or {}).get("step", self.raw.step)),
            sigma_window=None if window is None else (float(window[0]), float(window[1])),
            curve=_curve(self.ours.get("curve")),
        )

    def is_moe(self) -> bool:
        return "moe" in self.styles

    def _nothing_found(self) -> str:
        keys = list(self.raw.tensors)
        if keys and all(names.is_text_encoder(k) for k in keys):
            return f"{self.raw.name} holds text encoder weights only: use core's Load LoRA for CLIP"
        shown = ", ".join(keys[:2]) if keys else "nothing"
        return f"{self.raw.name} holds no LoRA known here (its keys: {shown}): check that it is a LoRA file"


def _curve(stored: object) -> tuple[tuple[int, float], ...]:
    """[[step, value], ...] of a header; what is not of that form is no curve."""
    if not isinstance(stored, list):
        return ()
    numbers = (int, float)
    pairs = [
        (int(pair[0]), float(pair[1]))
        for pair in stored
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(n, numbers) for n in pair)
    ]
    return tuple(pairs)


def _rows(tensor: Tensor, target: names.Target, width: int | None) -> Tensor:
    """The rows of a (possibly fused) layer's tensor that belong to this target, in diffusers' order."""
    if target.part is not None:
        start, stop = names.part_rows(target.part, tensor.shape[0], width)
        return tensor[start:stop]
    return torch.cat(tensor.chunk(2)[::-1]) if target.swap else tensor


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
