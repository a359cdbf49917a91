"""Recipes: YAML files of options, bundled beside this file or anywhere, with overrides laid over them.

`read` gives keys and values, `from_dict` types and checks them, `load` does both. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any

from ..config import TASKS, TrainConfig
from ..runtime.disk import reason
from ..tiny.options import TinyOptions

RECIPES = Path(__file__).parent

SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

# What ICEdit's YAML and diffusers' DreamBooth scripts call an option.
ELSEWHERE = {
    "flux_path": "model (the recipes icedit and icedit_moe are ICEdit's two configurations)",
    "train": "not a section of its own (the recipes icedit and icedit_moe are ICEdit's two configurations)",
    "pretrained_model_name_or_path": "model",
    "dtype": "base_dtype",
    "condition_size": "resolution",
    "target_size": "resolution",
    "drop_text_prob": "prompt_drop",
    "accumulate_grad_batches": "accumulation",
    "gradient_accumulation_steps": "accumulation",
    "train_batch_size": "batch_size",
    "save_interval": "save_every",
    "sample_interval": "sample_every",
    "r": "rank",
    "learning_rate": "lr",
    "lr_scheduler": "lr_schedule",
    "lr_warmup_steps": "lr_warmup",
    "max_train_steps": "max_steps",
    "max_grad_norm": "grad_clip",
    "use_8bit_adam": "optimizer=adamw8bit",
    "use_ema": "ema",
    "guidance_scale": "guidance (sample_guidance, rollout_guidance where images are made)",
    "num_inference_steps": "sample_steps (rollout_steps of reward training)",
    "instance_data_dir": "data=images:FOLDER?prompt=WORDS",
    "instance_prompt": "data=images:FOLDER?prompt=WORDS",
    "class_data_dir": "class_images=FOLDER?prompt=WORDS",
    "with_prior_preservation": "class_images=FOLDER?prompt=WORDS (prior preservation is on where it is set)",
    "class_data_root": "class_images=FOLDER?prompt=WORDS",
}


def summaries(prefix: str = "") -> dict[str, str]:
    """The bundled recipes whose name begins so, and of each the first sentence of its leading comment."""
    out = {}
    for path in sorted(RECIPES.glob(f"{prefix}*.yaml")):
        comment = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comment.append(line.lstrip("# "))
        out[path.stem] = " ".join(comment).partition(". ")[0].rstrip(".")
    return out


def recipe_path(name: str) -> Path:
    """A YAML file, or the bundled recipe of that name. Raises ValueError naming the bundled ones."""
    path = Path(name)
    bundled = RECIPES / (name if name.endswith(".yaml") else f"{name}.yaml")
    with contextlib.suppress(OSError, ValueError):  # too long, or not a name at all
        if path.is_file():
            return path
        if bundled.is_file():
            return bundled
    names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    near = difflib.get_close_matches(Path(name).stem, names, 1)
    hint = f"did you mean {near[0]}? There are" if near else "use one of"
    raise ValueError(f"recipe {name!r} is neither a file nor a bundled recipe: {hint} {', '.join(names)}")


def load(recipe: str, overrides: list[str] | None = None) -> TrainConfig:
    """A recipe with overrides, typed and checked. Raises ValueError on any mistake."""
    return from_dict(read(recipe, overrides))


def read(recipe: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Keys and values of a recipe (its `extends:` recipe first) and `key=value` overrides, not yet
    checked."""
    path = recipe_path(recipe)
    values = overridden(_read(path), overrides or [])
    if values.get("task", "fill") in TASKS:
        values.setdefault("recipe", path.stem)
    return values


def overridden(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The values with `key=value` texts, the value as in YAML, laid over them. Raises ValueError."""
    import yaml

    values = dict(values)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {text!r} is not of the form key=value")
        try:
            values[key.strip()] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError:
            raise ValueError(
                f"--set {text!r}: the value is not YAML; put quotes around what holds ? : & or [, "
                f"""for example --set '{key.strip()}=["..."]'"""
            ) from None
    return values


def _read(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    import yaml

    if path.resolve() in children:
        raise ValueError(f"recipe {path} extends itself: name another recipe in extends, or none")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"recipe {path} cannot be read: {reason(error)}") from error
    except UnicodeDecodeError:
        raise ValueError(f"recipe {path} is not UTF-8 text: save it as UTF-8") from None
    except RecursionError:
        raise ValueError(f"recipe {path} is nested too deeply: it is one level of keys and values") from None
    except (yaml.YAMLError, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        raise ValueError(f"recipe {path} is not YAML{line}: quote values that hold ? : & or [") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} is not a YAML mapping of keys to values")
    if odd := [key for key in values if not isinstance(key, str)]:
        raise ValueError(f"recipe {path} has the key {odd[0]!r}: keys are names of options")
    parent = values.pop("extends", None)
    if parent is not None and not isinstance(parent, str):
        raise ValueError(f"recipe {path} extends {parent!r}: give the name of a recipe, or a file")
    if parent:
        beside = path.parent / f"{parent}.yaml"
        above = _read(beside if beside.is_file() else recipe_path(parent), (*children, path.resolve()))
        values = {**above, **values}
    return values


def from_dict(values: dict[str, Any], kind: type = TrainConfig) -> Any:
    """The configuration that these values make: typed ("1e-4" and 1e-4 are the same) and checked.

    kind: its dataclass; where an option of the tiny models is among the values, the one with these. Empty
    values leave an option at its default. Raises ValueError naming the option.
    """
    kind = getattr(kind, "families", {}).get(values.get("task"), kind)
    tiny = {f.name for f in dataclasses.fields(TinyOptions)} if hasattr(kind, "tiny") else set()
    if tiny & values.keys() and not issubclass(kind, TinyOptions):
        kind = kind.tiny
    types = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    gone = getattr(kind, "gone", {})  # the small trainers of the tiny models have none
    for key in values:
        if key in gone:
            raise ValueError(f"option {key} is gone: {gone[key]}")
        if key not in names:
            hint = difflib.get_close_matches(key, [*names, *tiny], 1)
            remedy = f"did you mean {hint[0]!r}?" if hint else "see `diptych train --help`"
            if key in ELSEWHERE:
                remedy = f"here it is {ELSEWHERE[key]}"
            raise ValueError(f"unknown option {key!r} in the recipe: {remedy}")
    given = {key: value for key, value in values.items() if value is not None}
    return kind(**{key: _typed(key, value, types[key]) for key, value in given.items()})


def _typed(name: str, value: Any, hint: Any) -> Any:
    """A YAML value as the type of its option. Raises ValueError naming the option."""
    many = typing.get_origin(hint) is list
    kind = next(part for part in typing.get_args(hint) or (hint,) if part is not type(None))
    parts = value if isinstance(value, list) and many else [value]
    if any(isinstance(part, (list, dict)) for part in parts):
        raise ValueError(f"{name} is {value!r}: it takes {'a list of values' if many else 'one value'}")
    typed = [_one(name, part, kind) for part in parts]
    return typed if many else typed[0]


def _one(name: str, value: Any, kind: type) -> Any:
    if kind is str and value is False:
        return "no"  # YAML reads a bare no as false
    text = str(value)
    try:
        return SWITCH[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{name} is {value!r}: give {wanted}") from None
