"""custom + inpaint - base: the formula, what stays the finetune's own, every kind of file, refusals."""

from __future__ import annotations

import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.models import checkpoints
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DENOISER = "model.diffusion_model."
LAYERS = {
    "input_blocks.0.0.weight": (8, 4, 3, 3),
    "input_blocks.0.0.bias": (8,),
    "out.2.weight": (4, 8, 3, 3),
}
REST = {"first_stage_model.quant_conv.weight": (8, 8, 1, 1), "cond_stage_model.final.bias": (8,)}


def state(seed: int, channels: int = 4, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {DENOISER + name: shape for name, shape in LAYERS.items()} | REST
    shapes[f"{DENOISER}input_blocks.0.0.weight"] = (8, channels, 3, 3)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return tensors | {"cond_stage_model.position_ids": torch.arange(7)[None] + seed}


CUSTOM, INPAINT, BASE = state(0), state(1, 9), state(2)


def expected(custom=CUSTOM) -> dict[str, torch.Tensor]:
    """By the words of the recipe: only the denoiser changes, missing channels count as zeros."""
    made = dict(custom)
    for name in LAYERS:
        name = DENOISER + name
        whole = INPAINT[name].double()
        channels = custom[name].shape[1] if whole.ndim > 1 else None
        part = whole[:, :channels] if channels else whole
        part += custom[name].double() - BASE[name].double()
        made[name] = whole.to(custom[name].dtype)
    return made


@pytest.fixture
def files(tmp_path):
    for name, tensors in {"custom": CUSTOM, "inpaint": INPAINT, "base": BASE}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        torch.save({"state_dict": tensors}, tmp_path / f"{name}.ckpt")
        bare = {n.removeprefix(DENOISER): t for n, t in tensors.items() if n.startswith(DENOISER)}
        save_file(bare, tmp_path / f"{name}_unet.safetensors")
    return tmp_path


def merge(folder, custom="custom.safetensors", inpaint="inpaint.safetensors", base="base.safetensors", *more):
    others = ["--inpaint", folder / inpaint, "--base", folder / base, "-o", folder / "out.safetensors"]
    return cli.main(["merge-inpaint", *map(str, [folder / custom, *others, *more])])


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        close = {"rtol": 1e-3, "atol": 1e-4} if one[name].dtype == torch.float16 else {}
        torch.testing.assert_close(one[name], other[name], **close)
        assert one[name].dtype == other[name].dtype


@pytest.mark.parametrize("custom", ["custom.safetensors", "custom.ckpt"])
@pytest.mark.parametrize("inpaint", ["inpaint.safetensors", "inpaint.ckpt", "inpaint_unet.safetensors"])
def test_only_the_denoiser_changes_and_by_the_formula(files, custom, inpaint):
    assert merge(files, custom, inpaint, "base.ckpt") == 0
    made = load_file(files / "out.safetensors")
    same(made, expected())
    assert made[f"{DENOISER}input_blocks.0.0.weight"].shape == (8, 9, 3, 3)


def test_a_bare_unet_stays_one(files):
    assert merge(files, "custom_unet.safetensors") == 0
    bare = {n.removeprefix(DENOISER): t for n, t in expected().items() if n.startswith(DENOISER)}
    same(load_file(files / "out.safetensors"), bare)


def test_half_precision_is_computed_in_float32_and_stale_averages_are_left_out(files):
    half = {n: t.half() if t.is_floating_point() else t for n, t in CUSTOM.items()}
    save_file(half | {"model_ema.decay": torch.ones(())}, files / "half.safetensors")
    assert merge(files, "half.safetensors") == 0
    same(load_file(files / "out.safetensors"), expected(half))
    assert (
        merge(files, "half.safetensors", "inpaint.safetensors", "base.safetensors", "--dtype", "bfloat16")
        == 0
    )
    made = load_file(files / "out.safetensors")
    assert {t.dtype for t in made.values()} == {torch.bfloat16, torch.int64}
    own = expected({n: t.float() if t.is_floating_point() else t for n, t in half.items()})
    torch.testing.assert_close(made[f"{DENOISER}out.2.weight"], own[f"{DENOISER}out.2.weight"].bfloat16())


def test_the_file_is_what_safetensors_itself_would_read(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.arange(4),
        "c": torch.randn(2, 2).to(torch.float8_e4m3fn),
        "d": torch.tensor(True),
        "e": torch.randn(0, 4),
        "f": torch.randn(7).double(),
    }
    plan = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    checkpoints.stream(tmp_path / "x.safetensors", plan, lambda index, name: tensors[name])
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n].to(torch.float64), tensors[n].to(torch.float64)) for n in tensors)
    with checkpoints.opened(tmp_path / "x.safetensors") as file:
        assert {name: file.describe(name) for name in file.names()} == plan
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.get_tensor("a").data_ptr() % 2 == 0


@pytest.mark.parametrize(
    ("custom", "inpaint", "base", "message"),
    [
        ("none.safetensors", "inpaint.ckpt", "base.ckpt", "none.safetensors does not exist"),
        (
            "custom.ckpt",
            "base.ckpt",
            "base.ckpt",
            "takes 4 input channels, not 9: give an inpainting checkpoint",
        ),
        ("inpaint.ckpt", "inpaint.ckpt", "base.ckpt", "this one inpaints already"),
        (
            "custom.ckpt",
            "inpaint.ckpt",
            "inpaint.ckpt",
            "takes 9 input channels, not 4: give an ordinary checkpoint",
        ),
        ("vae.safetensors", "inpaint.ckpt", "base.ckpt", "holds no Stable Diffusion denoiser"),
        ("custom.ckpt", "other.safetensors", "base.ckpt", "differ in out.2.weight and 0 more layers"),
        ("broken.safetensors", "inpaint.ckpt", "base.ckpt", "cannot be read"),
        ("pickle.ckpt", "inpaint.ckpt", "base.ckpt", "cannot be read safely"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_nothing_is_written(
    files, custom, inpaint, base, message, capsys
):
    save_file({n: t for n, t in CUSTOM.items() if n.startswith("first")}, files / "vae.safetensors")
    save_file(INPAINT | {f"{DENOISER}out.2.weight": torch.ones(4, 9)}, files / "other.safetensors")
    (files / "broken.safetensors").write_bytes(b"x" * 100)
    torch.save({"state_dict": CUSTOM, "run": pytest.raises}, files / "pickle.ckpt")
    before = set(files.iterdir())
    assert merge(files, custom, inpaint, base) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert set(files.iterdir()) == before


@pytest.mark.parametrize(
    ("out", "message"), [("m.ckpt", "has another suffix"), ("custom.safetensors", "is custom itself")]
)
def test_the_output_is_safetensors_and_none_of_the_inputs(files, out, message, capsys):
    words = [files / "custom.safetensors", "--inpaint", files / "inpaint.ckpt", "--base", files / "base.ckpt"]
    assert cli.main(["merge-inpaint", *map(str, [*words, "-o", files / out])]) == 2
    assert message in capsys.readouterr().err
