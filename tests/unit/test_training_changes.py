"""What may change in a recipe between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from comfyui_diptych.training import recipes
from comfyui_diptych.training.multimodal.options import MultimodalOptions
from comfyui_diptych.training.reinforce.config import TinyGRPOConfig
from comfyui_diptych.training.runtime import changes

FOLDER = Path("step_00000010")


def sentences(before, now, world=(1, 1), step=10, contents=None):
    stamps = [
        contents[i] if contents else changes.stamps(c, "transformer") for i, c in enumerate((before, now))
    ]
    state = {
        "step": step, "world": world[0], "config": dataclasses.asdict(before), "files_of_config": stamps[0]
    }  # fmt: skip
    return changes.check(state, now, world[1], stamps[1], FOLDER)


def of(**values):
    return recipes.from_dict(values)


def test_every_option_that_is_named_exists():
    known = {field.name for kind in (TinyGRPOConfig, MultimodalOptions) for field in dataclasses.fields(kind)}
    assert changes.FIXED <= known and changes.FREE <= known and set(changes.PATHS) <= changes.FIXED
    assert not changes.FIXED & changes.FREE


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lora_alpha", 8.0), ("rank", 8), ("seed", 1), ("batch_size", 2), ("optimizer", "adamw"),
        ("target_modules", ["x"]), ("task", "kontext"), ("method", "moe_lora"), ("model", "a/b"),
        ("fuse_loras", ["a:0.5"]), ("init_lora", "a"),
    ],
)  # fmt: skip
def test_what_shapes_the_weights_cannot_change(option, value):
    with pytest.raises(
        ValueError, match=f"another recipe: .*(rows per step|{option} ).*choose another output"
    ):
        sentences(of(), of(**{option: value}))


def test_what_changes_the_way_from_here_is_named():
    named = sentences(of(lr=1e-3, prompt_drop=0.1), of(lr=1e-4, prompt_drop=0.0, ema=0.9))
    assert named == [
        f"the recipe changed since {FOLDER}: ema 0.0 -> 0.9; lr 0.001 -> 0.0001; prompt_drop 0.1 -> 0.0"
    ]


def test_what_changes_no_weight_is_not_mentioned():
    assert not sentences(
        of(), of(output_name="x", save_every=3, log_every=2, cache_in_memory=True, max_steps=5000)
    )
    assert not sentences(of(rank=16), of(rank=16, lora_alpha=16.0))
    assert sentences(of(lr_schedule="cosine"), of(lr_schedule="cosine", max_steps=2000))
    assert "beyond max_steps 5" in sentences(of(), of(max_steps=5))[-1]


def test_other_processes_go_on_where_the_rows_of_a_step_are_as_many():
    assert sentences(of(batch_size=2), of(batch_size=1), world=(1, 2)) == [
        f"{FOLDER} is of 1 processes, now there are 2"
    ]
    with pytest.raises(ValueError, match="rows per step over all processes 8 -> 2 .set batch_size: 4"):
        sentences(of(batch_size=1), of(batch_size=1), world=(8, 2))


def test_a_model_or_lora_that_only_moved_is_the_same(tmp_path):
    values = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "transformer" / "config.json").write_bytes(content)
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        lora = f"{tmp_path / name}.safetensors"
        values.append(of(model=str(tmp_path / name), init_lora=lora, fuse_loras=[f"{lora}:0.5"]))
    assert not sentences(values[0], values[1])
    with pytest.raises(ValueError, match="fuse_loras .*; init_lora .*; model "):
        sentences(values[0], values[2])
    contents = [changes.stamps(values[0], "transformer"), changes.stamps(values[2], "transformer")]
    (tmp_path / "a" / "transformer" / "config.json").write_bytes(b"3")  # another model of the same name
    contents[1] = changes.stamps(values[0], "transformer")
    with pytest.raises(ValueError, match="model "):
        sentences(values[0], values[0], contents=contents)


def test_options_that_one_of_two_versions_does_not_know():
    """Those of the tiny models count as left out, those of earlier versions are named."""
    assert not sentences(of(threads=1), of()) and not sentences(of(), of(threads=1))
    assert "noise_offset 0.3 -> 0.0" in sentences(of(noise_offset=0.3), of())[0]
    with pytest.raises(ValueError, match="init random -> pretrained"):
        sentences(of(method="full", init="random"), of(method="full"))
    old = dataclasses.asdict(of()) | {"logit_mean": 1.0, "data_limit": 0}
    state = {"step": 1, "world": 1, "config": old, "files_of_config": {}}
    told = changes.check(state, of(), 1, changes.stamps(of(), "transformer"), FOLDER)
    assert told == [f"{FOLDER} is of an earlier version, whose data_limit, logit_mean are gone or written "
                    "otherwise: they are not compared"]  # fmt: skip
