"""Scores tell a perfect editor from an idle one, and their report is strict JSON."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from comfyui_diptych.commands import score as command
from comfyui_diptych.models import tiny
from comfyui_diptych.training.data.sample import Sample
from comfyui_diptych.training.evaluate import measures, plots, sampling
from comfyui_diptych.training.evaluate.cases import Case, batches, shapes_cases, stack
from comfyui_diptych.training.evaluate.sampling import ScoreSettings
from comfyui_diptych.training.evaluate.score import QUESTIONS, Question, score
from PIL import Image

QUIET = ScoreSettings(batch=8)
HOST = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def cases():
    return shapes_cases(30, seed=1)


def editor(monkeypatch, cases, paint):
    """Replace the model by `paint(case) -> image`, found by source and instruction."""
    table = {(c.sample.prompt, c.sample.source.sum().item()): c for c in cases}

    def edit(denoiser, sources, instructions, settings, number):
        return torch.stack(
            [paint(table[w, s.sum().item()]) for w, s in zip(instructions, sources, strict=True)]
        )

    monkeypatch.setattr(sampling, "edit", edit)


def test_the_perfect_editor_scores_everything(monkeypatch, cases):
    editor(monkeypatch, cases, lambda case: case.sample.target)
    figures = score(HOST, cases, QUESTIONS["edit"], QUIET).figures()
    assert figures["success"] == figures["made"] == figures["kept"] == 1
    assert figures["kept_l1"] == 0 and figures["psnr"] == 100 and figures["ssim"] == pytest.approx(1)
    assert all(figures[f"success/{case.sample.task}"] == 1 for case in cases)


def test_the_idle_editor_keeps_everything_and_makes_nothing(monkeypatch, cases):
    editor(monkeypatch, cases, lambda case: case.sample.source)
    figures = score(HOST, cases, QUESTIONS["edit"], QUIET).figures()
    assert figures["made"] == figures["success"] == 0 and figures["kept_l1"] == 0 and figures["psnr"] < 30


def test_an_editor_that_spoils_the_rest_does_not_succeed(monkeypatch, cases):
    local = [case for case in cases if len(case.edit.places) == 1]

    def elsewhere(case):
        image = case.sample.target.clone()
        rows, columns = (case.sample.mask == 0).nonzero(as_tuple=True)
        image[rows, columns] = image[rows, columns] * 0.2 + 0.4
        return image

    editor(monkeypatch, local, elsewhere)
    figures = score(HOST, local, QUESTIONS["edit"], QUIET).figures()
    assert figures["success"] == 0 and figures["kept"] == 0 and figures["kept_l1"] > 0.1


def test_a_base_model_is_scored_inside_its_mask_only(monkeypatch, cases):
    painted = {}

    def fill(denoiser, images, masks, captions, settings, number):
        painted.update(zip(captions, masks, strict=True))
        return images

    monkeypatch.setattr(sampling, "fill", fill)
    scores = score(HOST, cases, QUESTIONS["fill"], QUIET)
    assert scores.figures()["caption"] == 1
    assert {row["prompt"] for row in scores.rows} == set(painted) == {c.sample.caption for c in cases}


def test_reconstructions_are_read_back_by_the_checker(cases):
    exact = SimpleNamespace(device=torch.device("cpu"), encode=lambda x: x, decode=lambda x: x)
    grey = SimpleNamespace(
        device=torch.device("cpu"), encode=lambda x: x, decode=lambda x: torch.full_like(x, 0.5)
    )
    assert score(exact, cases, QUESTIONS["vae"], QUIET).figures()["checker"] == 1
    assert score(grey, cases, QUESTIONS["vae"], QUIET).figures()["checker"] == 0


def test_the_report_is_strict_json_and_the_sheet_shows_the_first_rows(monkeypatch, cases, tmp_path):
    editor(monkeypatch, cases, lambda case: case.sample.target)
    scores = score(HOST, cases, QUESTIONS["edit"], QUIET, shown=5)
    scores.notes["dino"] = "not on disk"
    path = scores.save(tmp_path / "out", {"steps": 12})
    report = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert report["figures"]["success"] == 1 and report["notes"] == {"dino": "not on disk"}
    assert len(report["rows"]) == report["pictures"] == 30 and report["about"] == {"steps": 12}
    assert Image.open(tmp_path / "out/contact-sheet.png").width > 3 * 128


def test_images_of_different_sizes_are_batched_apart(cases):
    small = shapes_cases(5, size=32)
    mixed = [case for pair in zip(cases, small, strict=False) for case in pair]
    groups = list(batches(mixed, 3))
    assert sum(map(len, groups)) == 10
    assert all(len({case.sample.target.shape for case in group}) == 1 for group in groups)


def test_data_without_a_mask_is_judged_outside_what_changed():
    source = torch.zeros(1, 16, 16, 3)
    target = source.clone()
    target[:, :8] = 1
    sample = Sample("p", target[0], source[0])
    numbers = measures.of_edits([Case(sample)], target * 0.5)
    assert numbers["kept_l1"].item() == 0 and "success" not in numbers


def test_a_mask_over_all_of_the_image_is_said_and_no_figure(monkeypatch, cases):
    whole = [c._replace(sample=dataclasses.replace(c.sample, mask=torch.ones(64, 64))) for c in cases[:2]]
    editor(monkeypatch, whole, lambda case: case.sample.target)
    scores = score(HOST, whole, QUESTIONS["edit"], QUIET)
    assert "kept_l1" not in scores.figures() and scores.notes["kept_l1"] == "nothing to measure on any image"


def test_masks_of_some_rows_are_not_lost_where_others_have_none(cases):
    own = torch.zeros(64, 64)
    own[:3] = 1
    group = [
        case._replace(sample=dataclasses.replace(case.sample, mask=mask))
        for case, mask in zip(cases[:2], (own, None), strict=True)
    ]
    masks = measures.edit_masks(group)
    changed = (cases[1].sample.source - cases[1].sample.target).abs().mean(-1) > 0.1
    assert torch.equal(masks[0], own) and torch.equal(masks[1], changed.float()) and changed.any()


def test_models_that_are_not_on_disk_are_reported_not_downloaded():
    notes = {}
    assert measures.similarities(notes, "nobody/no-clip", "nobody/no-dino") == []
    assert set(notes) == {"clip_i and clip_t", "dino"} and "not on disk" in notes["dino"]


def test_a_sheet_shows_every_image_whole_and_its_rows_are_as_tall_as_they_are():
    colours = torch.eye(3)[:, None, None].expand(3, 16, 32, 3)
    sheet = plots.as_image(plots.contact_sheet([(list(colours), "words")], ("a", "b", "c"), side=64))[0]
    assert all((sheet == colour).all(-1).sum() == 64 * 32 for colour in torch.eye(3))
    square = plots.contact_sheet([([colours[0, :, :16]], "words")], side=64)
    assert square.height - 64 == sheet.shape[0] - 32 - 16  # headings take 16 rows more than a margin


def test_a_loss_curve_is_drawn_even_of_little():
    for values in ([], [float("nan")], [1.0], [3.0, float("nan"), 1.0, 2.0]):
        image = plots.as_image(plots.curve(enumerate(values, 1)))
        assert image.shape == (1, 360, 640, 3) and 0 < image.mean() < 1


def test_loras_of_the_command_line_add_up():
    file = str(tiny.folder() / "loras" / "icedit.safetensors")
    rows = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 32, 384, generator=rows),
        "encoder_hidden_states": torch.randn(1, 8, 64, generator=rows),
        "pooled_projections": torch.randn(1, 64, generator=rows),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([30.0]),
        "img_ids": torch.zeros(32, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    outputs = []
    for chosen in ([file], [f"{file}:0.75", f"{file}:0.25"], []):
        args = SimpleNamespace(engine="fill", model=None, device="cpu", dtype=None, lora=chosen, strength=1.0)
        denoiser, at_sigma, report = command.load(args)
        at_sigma(0.5)
        with torch.no_grad():
            outputs.append(denoiser.transformer(**inputs, return_dict=False)[0])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)
    assert (outputs[0] - outputs[2]).abs().max() > 0.01
    assert report == ""


@pytest.mark.parametrize("keep", [True, False])
def test_an_error_in_the_middle_keeps_what_was_scored_where_that_is_asked_for(keep):
    def make(denoiser, group, settings, number):
        if number == 1:
            raise RuntimeError("out of memory")
        return stack(group, "target")

    settings = ScoreSettings(batch=2, keep_partial=keep)
    question = Question(make, measures.of_reconstructions, ("original",), lambda case, made: [made])
    run = lambda: score(None, shapes_cases(4), question, settings, shown=9)  # noqa: E731
    if not keep:
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
        return
    scores = run()
    assert len(scores.rows) == 2 and len(scores.shown) == 2 and str(scores.failure) == "out of memory"
    assert scores.notes["ended early"] == "after 2 images: out of memory"
