"""The command line says what is wrong before it loads anything, and the doctor counts only real faults."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_diptych import cli, missing
from comfyui_diptych.commands import doctor, edit, engines, images, installed
from PIL import Image


@pytest.fixture
def photo(tmp_path) -> str:
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    Image.new("L", (1, 20000)).save(tmp_path / "thin.png")
    path = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return str(path)


@pytest.fixture
def fill_folder(tmp_path) -> str:
    """A folder that looks like FLUX Fill to everything but the loader."""
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "transformer" / "config.json").write_text('{"in_channels": 384}')
    return str(folder)


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(edit, "load", load)


WRONG = [
    (["{tmp}/none.png", "x"], "image {tmp}/none.png does not exist"),
    (["{tmp}/none.png"], "image {tmp}/none.png does not exist"),
    (["{photo}"], "an instruction is missing"),
    (["{photo}", "  "], "the instruction is empty"),
    (["{fill}/model_index.json", "x"], "model_index.json cannot be read"),
    (["{photo}", "x", "-o", "{tmp}/none/out.png"], "its folder does not exist"),
    (["{photo}", "x", "-o", "{tmp}/out.txt"], "has no image suffix"),
    (["{photo}", "x", "-o", "{photo}/out.png"], "{photo} is a file"),
    (["{photo}", "x", "-o", "{tmp}/" + "x" * 300 + ".png"], "has too long a name"),
    (["{photo}", "x", "--rule", "best"], "rule is 'best': choose one of ode"),
    (["{photo}", "x", "--rule", "flow", "--eta", "-1"], "eta is -1"),
    (["{photo}", "x", "--panel-width", "30"], "panel_width is 30: use a multiple of 16"),
    (["{photo}", "x", "--lora", "{tmp}/none.safetensors:0.8"], "LoRA {tmp}/none.safetensors does not exist"),
    (["{photo}", "x", "--mask", "{tmp}/none.png"], "image {tmp}/none.png does not exist"),
    (["{photo}", "x", "--mask", "{tmp}/black.png"], "mask {tmp}/black.png is empty, nowhere as white as 0.5"),
    (["{tmp}/thin.png", "x"], "a panel has at most 33 megapixels"),
    (["{photo}", "x", "--reference", "{photo}"], "--reference works with --engine kontext only"),
    (["{photo}", "x", "--cfg", "3"], "--cfg works with --engine kontext only"),
    (["{photo}", "x", "--device", "cuda:99"], "--device is cuda:99 but "),
    (["{photo}", "x", "--device", "meta"], "--device is meta: use cuda, mps or cpu"),
    (["{photo}", "x", "--device", "warp"], "--device is warp: use cuda, mps or cpu"),
    (["{photo}", "x", "--engine", "kontext"], "has 384 input channels where FLUX.1 Kontext has 64"),
    (["{photo}", "x", "--model", "{tmp}"], "has no model_index.json"),
    (["{photo}", "x", "--model", "{tmp}/none"], "model folder {tmp}/none does not exist"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_input_is_one_sentence_before_a_model_is_loaded(
    words, message, photo, fill_folder, tmp_path, capsys
):
    names = {"tmp": tmp_path, "photo": photo, "fill": fill_folder}
    words = [word.format(**names) for word in words]
    if "--model" not in words:
        words += ["--model", fill_folder]
    if "-o" not in words:
        words += ["-o", str(tmp_path / "out.png")]
    assert cli.main(["edit", *words]) == 2
    error = capsys.readouterr().err
    assert message.format(**names) in error
    assert error.count("\n") == 1


REFUSED = [
    (["edit", "--steps", "0"], "--steps: it is 0: give 1 or more"),
    (["edit", "--steps", "100000000000"], "--steps: it is 100000000000: give at most 10000"),
    (["edit", "--steps", "2.5"], "--steps: it is '2.5': give a whole number"),
    (["edit", "--guidance", "nan"], "--guidance: it is nan: give a finite number"),
    (["edit", "--cfg", "-inf"], "--cfg"),
    (["edit", "--eta=inf"], "--eta: it is inf: give a finite number"),
    (["edit", "--lora-strength", "1,5"], "--lora-strength: it is '1,5': give a number"),
    (["edit", "--seed", "9" * 22], "--seed: it is 9999999999999999999999: give at most"),
    (["edit", "--panel-width", "-64"], "--panel-width"),
    (["edit", "--best-of", "0"], "--best-of: it is 0: give 1 or more"),
    (["edit", "--stpes", "3"], "unknown option --stpes, did you mean --steps?"),
    (["score", "-n", "-1", "-o", "s"], "-n/--n: it is -1: give 1 or more"),
    (["score", "--guidance", "nan", "-o", "s"], "--guidance: it is nan"),
    (["score", "--dtype", "int8", "-o", "s"], "--dtype"),
    (["resize", "a", "--rank", "0", "-o", "b.safetensors"], "--rank: it is 0: give 1 or more"),
    (["train", "icedit", "--resum", "auto", "--st", "x=1"], "unknown option"),
    (["trian"], "invalid choice: 'trian'"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_values_are_refused_in_one_line_with_the_options_name(words, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and error.count("\n") == 1


BEFORE_WORK = [
    (["score", "-n", "1", "-o", "{photo}"], "output folder {photo} cannot be used: {photo} is a file"),
    (["score", "-n", "1", "--device", "foo", "-o", "{tmp}/s"], "--device is foo"),
    (["resize", "{tmp}/none", "--rank", "2", "-o", "{tmp}"], "has no suffix .safetensors"),
    (["resize", "{tmp}/none", "--rank", "2", "-o", "{photo}/x.safetensors"], "{photo} is a file"),
]


@pytest.mark.parametrize(("words", "message"), BEFORE_WORK, ids=[message for _, message in BEFORE_WORK])
def test_outputs_and_devices_are_looked_at_before_the_input(words, message, photo, tmp_path, capsys):
    names = {"tmp": tmp_path, "photo": photo}
    assert cli.main([word.format(**names) for word in words]) == 2
    assert message.format(**names) in capsys.readouterr().err


def ending_in(error: BaseException, monkeypatch, *options: str) -> int:
    def run(args):
        raise error

    monkeypatch.setattr(doctor, "run", run)
    return cli.main([*options, "doctor"])


def hub_error(name: str, text: str, *bases: type) -> BaseException:
    """As a library raises it, without importing one."""
    return type(name, bases or (Exception,), {})(text)


ENDINGS = [
    (PermissionError(13, "Permission denied", "/a/b"), "/a/b may not be used by this user"),
    (NotADirectoryError(20, "Not a directory", "/a/b"), "/a/b goes through a file"),
    (OSError(28, "No space left on device"), "the disk is full; free some space"),
    (OSError(30, "Read-only file system", "/a/b"), "/a/b is on a read-only disk"),
    (ModuleNotFoundError("No module named 'diffusers'", name="diffusers"), "diffusers is not installed: "),
    (ModuleNotFoundError("No module named 'datasets'", name="datasets"), "-m pip install datasets"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the device's memory is full"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 25 GB"), "main memory is full"),
    (AssertionError("Torch not compiled with CUDA enabled"), "this torch is built without CUDA: install"),
    (hub_error("ConnectError", "[Errno -3] no name"), "unexpected ConnectError"),
    (hub_error("GatedRepoError", "403", OSError), "asks for its licence"),
    (hub_error("LocalEntryNotFoundError", "not cached", FileNotFoundError), "the network was needed"),
    (hub_error("SafetensorError", "header too large"), "a weights file is damaged"),
    (OSError("x is not a local folder and is not a valid model identifier"), "no such folder here"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "text is not UTF-8"),
    (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    (OverflowError("int too big to convert"), "a number is too large"),
]


@pytest.mark.parametrize(("error", "message"), ENDINGS, ids=[message for _, message in ENDINGS])
def test_every_ending_is_one_sentence_with_a_remedy(error, message, monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    code = ending_in(error, monkeypatch)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and said.startswith("diptych doctor: ")
    assert code == (1 if "unexpected" in message else 2)


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        ending_in(ZeroDivisionError("x"), monkeypatch, "--debug")


def test_a_reader_that_went_away_does_not_end_the_work(capsys, monkeypatch):
    class Gone:
        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stdout", Gone())
    done = []
    monkeypatch.setattr(doctor, "run", lambda args: [print("x"), print("y"), done.append(1)] and 0)
    assert cli.main(["doctor"]) == 0 and done


def test_what_a_terminal_cannot_spell_is_written_in_another_way(monkeypatch):
    import io

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    monkeypatch.setattr(doctor, "run", lambda args: print("caf\u00e9"))
    assert cli.main(["doctor"]) == 0
    assert raw.getvalue() == b"caf\\xe9\n"


def request_for(*words: str) -> edit.Request:
    return edit.check(cli.build_parser().parse_args(["edit", *words]))


def test_the_defaults_are_those_the_models_were_trained_at(photo, fill_folder, tmp_path):
    fill = request_for(photo, "make it blue", "--model", fill_folder)
    assert (fill.engine, fill.panel_width, fill.guidance, fill.sampling.steps) == ("fill", 512, 50.0, 28)
    (Path(fill_folder) / "transformer" / "config.json").write_text('{"in_channels": 64}')
    kontext = request_for(photo, "make it blue", "--model", fill_folder)
    assert (kontext.engine, kontext.panel_width, kontext.guidance) == ("kontext", None, 2.5)


def test_words_alone_edit_the_demo_image(fill_folder):
    request = request_for("make the circle red", "--model", fill_folder)
    assert request.image.shape == (1, 64, 64, 3)
    assert request.instruction == "make the circle red"


def test_a_hub_id_tells_its_engine():
    assert request_for("x", "--model", "black-forest-labs/FLUX.1-Kontext-dev").engine == "kontext"
    assert request_for("x", "--model", "black-forest-labs/FLUX.1-Fill-dev").engine == "fill"


@pytest.mark.parametrize(
    ("mode", "channels"), [("RGB", 3), ("L", 3), ("P", 3), ("CMYK", 3), ("RGBA", 4), ("LA", 4)]
)
def test_images_of_every_mode_are_read(tmp_path, mode, channels):
    path = tmp_path / "image.tif"
    Image.new("RGB", (4, 6), (10, 200, 30)).convert(mode).save(path)
    image = images.load_image(path)
    assert image.shape == (1, 6, 4, channels)
    assert 0 <= image.min() and image.max() <= 1


def test_sixteen_bits_keep_their_precision(tmp_path):
    values = np.array([[0, 1000], [40000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = images.load_image(tmp_path / "deep.png")
    assert torch.allclose(image[0, ..., 0], torch.from_numpy(values / 65535).float())


def test_a_turned_photo_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert images.load_image(tmp_path / "turned.jpg").shape == (1, 8, 4, 3)


def test_a_mask_is_white_or_transparent_where_it_repaints(tmp_path):
    gray = Image.new("L", (4, 4), 0)
    gray.putpixel((1, 2), 255)
    gray.save(tmp_path / "gray.png")
    clear = Image.new("RGBA", (4, 4), "red")
    clear.putpixel((1, 2), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    masks = [images.load_mask(tmp_path / name) for name in ("gray.png", "clear.png")]
    assert torch.equal(*masks)
    assert masks[0].sum() == 1 and masks[0][0, 2, 1] == 1


def test_saving_and_reading_an_image_keeps_its_bytes(tmp_path):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)) / 255
    images.save(images.to_pil(image), tmp_path / "out.png")
    assert torch.equal(images.load_image(tmp_path / "out.png")[0], image)


def test_side_by_side_holds_both_images_in_order():
    before, after = torch.zeros(64, 64, 3), torch.ones(64, 64, 4) * torch.tensor([0.0, 1.0, 0.0, 1.0])
    sheet = images.side_by_side(before, after, "make it green " * 12)
    colours = [colour for _, colour in sorted(sheet.getcolors(1 << 20), reverse=True)]
    assert {(0, 0, 0), (0, 255, 0), (255, 255, 255)} <= set(colours)
    assert sheet.getpixel((20, 100)) == (0, 0, 0)
    assert sheet.getpixel((sheet.width - 20, 100)) == (0, 255, 0)


def findings(sections) -> list[doctor.Finding]:
    return [finding for _, found in sections for finding in found]


def test_the_doctor_is_content_without_comfyui_and_models(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(installed, "all_comfyui_folders", lambda: [])
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("DIPTYCH_TINY_FOLDER", str(tmp_path))
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "no ComfyUI found" in said
    for engine in ("FLUX.1 Fill (fill)", "FLUX.1 Kontext (kontext)", "SD inpainting (sd_inpaint)"):
        assert f"{engine} is not on this machine" in said
    for engine in ("glid-3-xl-stable (glid)", "PowerPaint v1 (powerpaint)"):
        assert f"{engine} is not on this machine" in said
    assert "bundled tiny models (fill, kontext, sd_inpaint, glid, multimodal) are not in" in said
    assert "diptych web: gradio" in said and "judges ready: " in said
    assert "The pack can run." in said


def test_the_doctor_names_what_is_too_old_or_missing(monkeypatch, capsys):
    needs = [("numpy", "99.0"), ("no-such-package", "1.0")]
    monkeypatch.setattr(doctor, "requirements", lambda: needs)
    found = list(doctor.libraries())
    assert [finding.state for finding in found] == ["fault", "fault"]
    assert [finding.remedy for finding in found] == [
        'pip install "numpy>=99.0"',
        'pip install "no-such-package>=1.0"',
    ]
    assert cli.main(["doctor"]) == 1


def test_the_doctor_checks_every_line_of_the_requirements():
    lines = (installed.PACK / "requirements.txt").read_text().split()
    assert [f"{name}>={bound}" for name, bound in doctor.requirements()] == lines


def test_versions_compare_by_number():
    assert doctor.numbers("2.13.0+cpu") > doctor.numbers("2.4")
    assert doctor.numbers("0.3.64") < doctor.numbers("0.10.0.dev1")


def make_comfyui(folder: Path) -> Path:
    for name in ("comfy/sd.py", "main.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "comfyui_version.py").write_text('__version__ = "0.3.1"\n')
    return folder


def test_comfyui_is_found_where_it_is_named_or_above_custom_nodes(monkeypatch, tmp_path):
    named, around = make_comfyui(tmp_path / "a"), make_comfyui(tmp_path / "b")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert installed.comfyui_folders() == [named]
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    workspace = make_comfyui(tmp_path / "comfy" / "ComfyUI")
    monkeypatch.setattr(installed, "PACK", around / "custom_nodes" / "any-name")
    assert installed.all_comfyui_folders() == [named, around, workspace]
    monkeypatch.delenv("COMFYUI_PATH")
    monkeypatch.setattr(installed, "PACK", around / "custom_nodes" / "any-name")
    assert installed.comfyui_folders() == [around]


def test_the_doctor_asks_for_a_newer_comfyui_and_for_the_pack_in_it(tmp_path):
    old = make_comfyui(tmp_path / "comfyui")
    (old / "custom_nodes").mkdir()
    found = list(doctor.comfyui([old]))
    assert "ComfyUI 0.3.1" in found[0].what
    assert "0.3.64 or newer" in found[0].remedy
    assert "custom_nodes" in found[1].remedy


def test_downloaded_models_and_loras_are_found(monkeypatch, tmp_path):
    snapshot = tmp_path / "models--black-forest-labs--FLUX.1-Fill-dev" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    comfyui = make_comfyui(tmp_path / "comfyui")
    for name in ("diffusion_models/flux1-kontext.gguf", "loras/icedit_lora.safetensors"):
        path = comfyui / "models" / name
        path.parent.mkdir(parents=True)
        path.touch()
    shared = tmp_path / "shared" / "unets" / "sd-v1-5-inpainting.safetensors"
    shared.parent.mkdir(parents=True)
    shared.touch()
    lines = f"any:\n  base_path: {tmp_path / 'shared'}\n  diffusion_models: |\n    none/\n    unets/\n"
    (comfyui / "extra_model_paths.yaml").write_text(lines, encoding="utf-8")
    found = list(engines.engines([comfyui]))
    assert [finding.state for finding in found] == ["ok", "ok", "ok", "missing", "missing", "ok"]
    assert str(shared) in found[2].what and "hf download JunhaoZhuang" in found[4].remedy


def test_the_doctor_says_that_torch_was_built_without_cuda(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(installed, "nvidia_gpu", lambda: True)
    assert missing.CUDA in [finding.remedy for finding in doctor.compute()]


def test_the_help_text_loads_nothing_heavy(capsys, monkeypatch):
    before = set(sys.modules)
    with pytest.raises(SystemExit):
        cli.main(["edit", "--help"])
    assert "INSTRUCTION" in capsys.readouterr().out
    new = {name.split(".")[0] for name in set(sys.modules) - before}
    assert not new & {"diffusers", "transformers", "peft", "accelerate"}
