"""The work behind the page of `diptych web`, without Gradio: it does what the commands do."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.commands import web
from comfyui_diptych.models import image_files, tiny
from comfyui_diptych.models.lora.read import read as read_lora
from comfyui_diptych.page import canvas as canvases
from comfyui_diptych.page import editing, examples, models, painting, wording
from comfyui_diptych.page.backend import Backend, read_image
from comfyui_diptych.page.jobs import Job, Jobs, Stopped
from comfyui_diptych.page.models import Offer
from PIL import Image

FILL, KONTEXT = "FLUX Fill: tiny", "FLUX Kontext: tiny"


@pytest.fixture(scope="module")
def backend():
    made = Backend(Offer())
    yield made
    made.close()


@pytest.fixture(scope="module")
def example(backend) -> list:
    return examples.edits(backend.folder)[0]


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path))


def edited(backend, example, lora=models.AS_TRAINED, model=FILL, candidates=1, job=None, seed=3):
    return editing.run(backend, job or Job(), *example, model, lora, 1.0, candidates, seed, 2)


@pytest.mark.parametrize("model", [FILL, KONTEXT])
def test_an_edit_is_that_of_the_command(backend, example, model, tmp_path):
    before, after, said = edited(backend, example, model=model)
    engine = "fill" if model == FILL else "kontext"
    out = tmp_path / "out.png"
    words = ["edit", *example, "--engine", engine, "--seed", "3", "--steps", "2", "-o", str(out)]
    assert cli.main(words) == 0
    assert np.array_equal(np.array(image_files.to_pil(after[0])), pixels(out))
    assert np.array_equal(np.array(image_files.to_pil(before[0])), pixels(example[0]))
    assert "The model saw the image" in said and ("icedit" in said) == (model == FILL)


def test_a_lora_is_taken_off_after_the_edit(backend, example):
    bare = edited(backend, example, models.NO_LORA)[1]
    assert not torch.equal(edited(backend, example)[1], bare)
    assert torch.equal(edited(backend, example, models.NO_LORA)[1], bare)


def test_a_lora_is_taken_off_when_the_edit_is_stopped(backend, example):
    bare, job = edited(backend, example, models.NO_LORA)[1], Job()
    job.step = lambda count=1: job.stop() or job._check()
    with pytest.raises(Stopped):
        edited(backend, example, job=job)
    assert torch.equal(edited(backend, example, models.NO_LORA)[1], bare)


def test_best_of_several_says_the_scores_and_keeps_one_of_them(backend, example):
    job = Job()
    _, after, said = edited(backend, example, model=KONTEXT, candidates=3, job=job, seed=5)
    alone = [edited(backend, example, model=KONTEXT, seed=seed)[1] for seed in (5, 6, 7)]
    assert "of seeds 5 to 7" in said and job.done == job.total == 4
    assert any(torch.allclose(after, one, atol=1e-5) for one in alone)


def test_steps_are_told_and_a_stop_ends_at_the_next_one(backend, example):
    told, job = [], Job(lambda done, total: told.append((done, total)))
    edited(backend, example, job=job)
    assert told == [(1, 2), (2, 2)]
    job = Job(lambda *_: job.stop())
    with pytest.raises(Stopped, match="stopped after 1 of 2 steps"):
        edited(backend, example, job=job)


def test_visitors_wait_for_one_another_and_stop_their_own_work_only():
    jobs, order, began = Jobs(), [], threading.Event()

    def first(job):
        began.set()
        for _ in range(1000):
            threading.Event().wait(0.005)
            job.step()

    def run(visitor, work):
        try:
            jobs.run(visitor, work, what="editing")
        except Stopped as stopped:
            order.append((visitor, str(stopped)[:14]))

    threads = [threading.Thread(target=run, args=("a", first))]
    threads[0].start()
    began.wait()
    threads.append(threading.Thread(target=run, args=("b", lambda job: order.append(("b", "ran")))))
    threads[1].start()
    assert not jobs.stop("c") and not jobs.stop("a", "filling") and order == []
    assert jobs.stop("a")
    for thread in threads:
        thread.join(10)
    assert order == [("a", "stopped after "), ("b", "ran")] and not jobs.stop("a")


def test_only_names_of_the_menus_are_looked_up(backend, example, tmp_path):
    with pytest.raises(ValueError, match="model is '/etc': choose one of FLUX Fill: tiny"):
        edited(backend, example, model="/etc")
    for name in (str(tiny.folder() / "loras" / "icedit.safetensors"), "../card.json", None):
        with pytest.raises(ValueError, match="choose one of as the model needs, none, icedit"):
            edited(backend, example, lora=name)
    with pytest.raises(ValueError, match="choose one of FLUX Fill: tiny, SD inpainting: tiny, glid: tiny"):
        painting.extend(backend, Job(), example[0], "x", {"left": "8"}, "direct", KONTEXT, 0, 1)


def test_menus_have_given_models_first_and_loras_of_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    source = tiny.folder() / "loras" / "icedit_moe.safetensors"
    (tmp_path / "deep" / "mine.safetensors").write_bytes(source.read_bytes())
    (tmp_path / "notes.txt").write_text("no LoRA")
    offer = Offer([str(tiny.folder() / "kontext"), str(tiny.folder() / "sd_inpaint")], tmp_path)
    assert offer.labels(models.EDIT)[:2] == ["FLUX Kontext: kontext", FILL]
    assert offer.labels(models.PAINT)[0] == "SD inpainting: sd_inpaint"
    given = offer.model("FLUX Kontext: kontext", models.EDIT)
    assert offer.lora_names(given) == [models.AS_TRAINED, models.NO_LORA, "deep/mine.safetensors"]
    found = offer.lora("deep/mine.safetensors", given)
    assert read_lora(found).modules.keys() == read_lora(source).modules.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "{tmp}"], "is no model folder"),
        (["--model", "{tmp}/none"], "does not exist"),
        (["--loras", "{tmp}/none"], "is no folder"),
        (["--judge", "none_such"], "none_such"),
        (["--device", "warp"], "--device is warp"),
    ],
)
def test_wrong_options_are_one_sentence_before_anything_is_served(
    options, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(web, "find_spec", lambda _: object())
    assert cli.main(["web", *(word.format(tmp=tmp_path) for word in options)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_without_gradio_one_sentence_has_the_command(monkeypatch, capsys):
    monkeypatch.setattr(web, "find_spec", lambda _: None)
    assert cli.main(["web"]) == 2
    said = capsys.readouterr().err
    assert 'gradio is not installed: run "' in said and '-m pip install "gradio>=' in said
    assert said.count("\n") == 1


def test_a_fill_is_that_of_the_command_and_keeps_the_rest(backend, tmp_path):
    value, prompt = examples.fills(backend.folder)[0]
    mask = torch.zeros(1, 64, 64)
    mask[:, 32:, 32:] = 1
    Image.fromarray((mask[0].numpy() * 255).astype("uint8")).save(tmp_path / "mask.png")
    before, after = painting.fill(backend, Job(), value["background"], mask, prompt, FILL, 3, 2)
    out = tmp_path / "out.png"
    words = ["inpaint", value["background"], prompt, "--mask", str(tmp_path / "mask.png"), "--seed", "3"]
    assert cli.main([*words, "--steps", "2", "-o", str(out)]) == 0
    assert np.array_equal(np.array(image_files.to_pil(after[0])), pixels(out))
    assert torch.equal(after[mask == 0], before[mask == 0]) and not torch.equal(after, before)


@pytest.mark.parametrize("model", [FILL, "SD inpainting: tiny", "glid: tiny"])
def test_an_outpaint_is_that_of_the_command(backend, model, tmp_path):
    path, prompt, *amounts = examples.outpaints(backend.folder)[0]
    amounts = dict(zip(("left", "top", "right", "bottom"), amounts, strict=True))
    before, after = painting.extend(backend, Job(), path, prompt, amounts, "direct", model, 1, 4)
    engine = {"FLUX": "fill", "SD": "sd_inpaint", "glid:": "glid"}[model.split()[0]]
    out = tmp_path / "out.png"
    words = ["outpaint", path, prompt, "--right", "100%", "--engine", engine, "--seed", "1", "--steps", "4"]
    assert cli.main([*words, "-o", str(out)]) == 0
    assert np.array_equal(np.array(image_files.to_pil(after[0])), pixels(out))
    assert after.shape == before.shape == (1, 64, 64, 3)
    assert torch.equal(before[:, :, :32], after[:, :, :32]) and bool((before[:, :, 32:] == 0.5).all())


def test_a_canvas_is_painted_twice_and_undone(backend):
    canvas, job = backend.canvas("visitor"), Job()
    image, prompt = examples.start()
    canvas.write(image, 0, 0, "start over")
    options = (False, prompt, FILL, 0, 2)
    box = {"x": 32, "y": 0, "width": 64, "height": 64}
    painting.canvas_box(backend, job, canvas, box, *options)
    once = canvas.store.export()
    painting.canvas_box(backend, job, canvas, {**box, "x": 16, "y": -32}, *options)
    assert tuple(canvas.bounds) == (0, -32, 96, 96) and job.done == job.total == 4
    seen, unknown = canvas.store.read(once[2])
    assert torch.equal(seen, once[0]) and not unknown.any()
    canvas.undo()
    assert tuple(canvas.bounds) == (0, 0, 96, 64) and torch.equal(canvas.store.export()[0], once[0])
    canvas.undo()
    assert torch.equal(canvas.store.export()[0], (image * 255).round() / 255)
    canvas.undo()
    assert canvas.bounds is None
    with pytest.raises(ValueError, match="nothing to undo"):
        canvas.undo()
    backend.forget("visitor")
    assert not canvas.folder.exists()


def test_the_first_box_lies_half_over_the_edge():
    assert canvases.first_box(canvases.Region(0, 0, 64, 64), 64) == (32, 0, 64, 64)
    assert canvases.first_box(canvases.Region(0, 0, 1000, 700), 1024) == (480, 0, 1024, 1024)
    assert canvases.first_box(canvases.Region(0, 0, 8, 8), 512) == (-256, 0, 512, 512)


def test_a_canvas_keeps_so_many_steps_and_no_more_folders(tmp_path):
    canvas = canvases.Canvas(tmp_path)
    for step in range(canvases.STEPS_BACK + 5):
        canvas.write(torch.full((1, 8, 8, 3), step / 100), 8 * step, 0, "all")
    assert len(list(tmp_path.iterdir())) == canvases.STEPS_BACK + 1
    for _ in range(canvases.STEPS_BACK):
        canvas.undo()
    assert canvas.bounds.width == 8 * 5
    with pytest.raises(ValueError, match="nothing to undo"):
        canvas.undo()


def test_a_stopped_box_leaves_the_canvas_as_it_was(backend):
    canvas = backend.canvas("stopper")
    canvas.write(examples.start()[0], 0, 0, "start over")
    job = Job(lambda *_: job.stop())
    with pytest.raises(Stopped):
        painting.canvas_box(
            backend, job, canvas, {"x": 32, "y": 0, "width": 64, "height": 64}, False, "x", FILL, 0, 3
        )
    assert tuple(canvas.bounds) == (0, 0, 64, 64)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (None, "the box is None"),
        ({"x": 0}, "give x, y, width and height"),
        ({"x": "a", "y": 0, "width": 64, "height": 64}, "give x, y, width and height"),
        ({"x": 0, "y": 0, "width": 60, "height": 64}, "width is 60: use a multiple of 16"),
        ({"x": 0, "y": 0, "width": 64, "height": 10**6}, "height is 1000000"),
        ({"x": float("inf"), "y": 0, "width": 64, "height": 64}, "give x, y, width and height"),
        ({"x": 10**12, "y": 0, "width": 64, "height": 64}, "from the origin"),
        ({"x": 0, "y": 0, "width": 64, "height": 64}, "everything in the box is known"),
    ],
)
def test_a_box_that_cannot_be_painted_is_one_sentence(backend, box, message):
    canvas = backend.canvas("boxes")
    if canvas.bounds is None:
        canvas.write(examples.start()[0], 0, 0, "start over")
    with pytest.raises(ValueError, match=message):
        painting.canvas_box(backend, Job(), canvas, box, False, "a prompt", FILL, 0, 1)


def test_what_is_missing_is_one_sentence(backend, example, tmp_path):
    run = {
        "an image is missing": lambda: edited(backend, [None, "x"]),
        "the instruction is empty": lambda: edited(backend, [example[0], " "]),
        "nothing is drawn": lambda: painting.fill(backend, Job(), example[0], None, "x", FILL, 0, 1),
        "the prompt is empty": lambda: painting.extend(
            backend, Job(), example[0], "", {"left": "8"}, "direct", FILL, 0, 1
        ),
        "left: it is 'wide'": lambda: painting.extend(
            backend, Job(), example[0], "x", {"left": "wide"}, "direct", FILL, 0, 1
        ),
        "seed is empty": lambda: edited(backend, example, seed=None),
        "seed is -1": lambda: edited(backend, example, seed=-1),
        "best of is 99": lambda: edited(backend, example, candidates=99),
        "nothing is to be painted": lambda: painting.extend(
            backend, Job(), example[0], "x", {"left": ""}, "direct", FILL, 0, 1
        ),
    }
    for message, call in run.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_sentences_show_no_path_of_the_server_and_no_markup(backend):
    broken = backend.folder / "files" / "abc" / "photo.png"
    broken.parent.mkdir(parents=True, exist_ok=True)
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError) as raised:
        read_image(str(broken))
    said = backend.sentence(raised.value)
    assert said.startswith("image photo.png cannot be read") and str(backend.folder) not in said
    assert backend.sentence(ValueError("model is '<img src=x>'")) == "model is '&lt;img src=x&gt;'"


def test_texts_and_images_of_a_multimodal_model(tmp_path):
    from comfyui_diptych.models.multimodal import GenerativeMultimodalModel, word_tokenizer

    words = "a white background with small red circle at the top left".split()
    GenerativeMultimodalModel.from_preset("tiny", word_tokenizer(words)).save_pretrained(tmp_path / "mine")
    backend = Backend(Offer([str(tmp_path / "mine")]))
    try:
        told, label = [], "Multimodal: mine"
        job = Job(lambda *step: told.append(step))
        made = wording.generate(backend, job, "a red circle", label, 2, 3, 2.0, 1)
        assert made.shape[0] == 2 and made.shape[-1] == 3 and told == [(1, 3), (2, 3), (3, 3)]
        said = []
        wording.generate(backend, Job(), "a red <b>", label, 1, 1, 2.0, 1, remark=said.append)
        assert len(said) == 1 and "not known b" in said[0] and "&lt;b&gt;" in said[0]
        path = examples.images(backend.folder)[0][0]
        captions = wording.caption(backend, Job(), path, label, 2, 0.9, 1)
        assert len(captions) == 2 and any(word in " ".join(captions) for word in words)
        assert captions == wording.caption(backend, Job(), path, label, 2, 0.9, 1)
        for call, message in (
            (lambda: wording.generate(backend, Job(), " ", label, 1, 3, 2.0, 1), "the prompt is empty"),
            (lambda: wording.generate(backend, Job(), "x", label, 99, 3, 2.0, 1), "images is 99"),
            (lambda: wording.caption(backend, Job(), path, label, 2, 0, 1), "temperature is 0"),
            (lambda: wording.caption(backend, Job(), None, label, 1, 0, 1), "an image is missing"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    finally:
        backend.close()
