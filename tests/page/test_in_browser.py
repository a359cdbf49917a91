"""In a real browser the page edits, compares, stops, fills, outpaints, undoes, exports, generates, captions.

DIPTYCH_SCREENSHOT=docs/web.jpg also saves what was seen of the Edit tab.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from comfyui_diptych import cli
from comfyui_diptych.page import examples
from PIL import Image

HERE = Path(__file__).parent
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("seen")


@pytest.fixture(scope="module")
def example(folder) -> list:
    return examples.edits(folder)[0]


@pytest.fixture(scope="module")
def visit(web, browser, folder, example):
    """visit(part, ...) -> what `browser.cjs` saw."""
    node, playwright, chromium = browser
    image, instruction = example
    always = {"playwright": playwright, "chromium": chromium, "url": web.url, "folder": str(folder)}
    always |= {"image": image, "instruction": instruction, "steps": STEPS}

    def run(*parts: str, **more) -> dict:
        command = [node, str(HERE / "browser.cjs"), json.dumps({**always, **more, "parts": parts})]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert seen["problems"] == [] and seen["strangers"] == []  # nothing is fetched from elsewhere
        return seen

    return run


def image_of(seen: list) -> np.ndarray:
    width, height, values = seen
    return np.array(values, dtype=np.uint8).reshape(height, width, 4)[..., :3]


def file(path: str | Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def shot(name: str) -> str | None:
    found = os.environ.get(name)
    return found and str(Path(found).resolve())


def test_edit_compare_error_progress_stop_and_example(visit, example, folder):
    seen = visit("editing", "examples", screenshot=shot("DIPTYCH_SCREENSHOT"))
    before, after = map(image_of, seen["edit"])
    out = folder / "command.png"
    assert cli.main(["edit", *example, "--steps", str(STEPS), "-o", str(out)]) == 0
    assert np.array_equal(before, file(example[0])) and np.array_equal(after, file(out))
    assert "icedit" in seen["report"] and seen["sliderMoved"]
    assert "the instruction is empty: say what to change" in seen["error"]
    assert re.search(r"\d+/100 steps", seen["progress"])
    done, total = map(int, re.search(r"next step, (\d+) of (\d+) were done", seen["stopped"]).groups())
    assert 2 <= done < total == 100
    assert seen["example"] == examples.pair(examples.EDITS[1]).instruction


def test_a_drawn_mask_is_filled_and_the_rest_kept(visit, example):
    before, after = map(image_of, visit("filling")["fill"])
    assert np.array_equal(before, file(example[0]))
    changed = (before != after).any(-1)
    assert changed.any() and not changed[:16].any() and not changed[:, :16].any()


def test_an_outpaint_has_its_size_and_the_known_pixels_and_can_leave_the_queue(visit, example):
    seen = visit("show_paint", "outpainting", "waiting")
    before, after = map(image_of, seen["outpaint"])
    assert before.shape == after.shape == (64, 96, 3)  # 50 % more on the right
    assert np.array_equal(after[:, :64], file(example[0])) and (before[:, 64:] == 128).all()
    assert seen["takenOut"]


def test_the_canvas_is_painted_twice_undone_and_exported(visit, example, folder):
    boxes = visit("show_paint", "canvas", canvasShot=shot("DIPTYCH_CANVAS_SCREENSHOT"))["boxes"]
    places = [re.match(r"box at (-?\d+), (-?\d+)", text).groups() for text in boxes]
    assert places[:3] == [("32", "0"), ("16", "0"), ("0", "-32")]
    # Moving and zooming moves no box, and an undo leaves the view as it is.
    assert places[3:] == [places[2]] * 2 and boxes[3] != boxes[2] and boxes[4] == boxes[3]
    twice, undone, known = Image.open(folder / "twice.png"), file(folder / "undone.png"), file(example[0])
    assert twice.size == (80, 96) and undone.shape == (64, 80, 3)
    assert np.array_equal(undone[:, :64], known)
    assert np.array_equal(np.array(twice.convert("RGB"))[32:], undone)
    assert twice.mode == "RGBA"  # a corner of the export is unknown
    alpha = np.array(twice)[..., 3]
    assert (alpha[32:] == 255).all() and (alpha[:32, :64] == 255).all() and not alpha[:32, 64:].any()


def test_a_text_becomes_images_and_an_image_words(visit):
    seen = visit("words")
    assert "not known dinosaur" in seen["remark"]
    assert len(seen["generated"]) >= 2 and set(seen["generated"]) == {seen["generated"][0]}
    assert seen["caption"].strip()
