"""A run's folder as one page: what was logged is what is drawn, nothing is loaded, any folder opens."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comfyui_diptych import cli
from comfyui_diptych.training.config import TrainConfig
from comfyui_diptych.training.evaluate import html, report, run_folder, svg
from comfyui_diptych.training.reinforce.config import GRPOConfig
from PIL import Image

COMMAND = "diptych grpo grpo_fast --set 'data=[pairs:my pairs]' --resume auto"


def logged(folder: Path, steps: range, by_reward: bool = False) -> None:
    """Logs as the trainers write them, one line of each cut short and one that is no number."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in steps:
            row = {
                "step": step,
                "steps": 99,
                "loss": 1 / step,
                "grad_norm": 2.0,
                "lr": 1e-4,
                "seconds_left": 3,
            }
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 50, "los')
    if by_reward:
        with open(folder / "rewards.jsonl", "w", encoding="utf-8") as file:
            for step in steps:
                row = {"step": step, "reward/shapes": step / 10, "kept": math.nan}
                file.write(json.dumps(row | ({} if step % 2 else {"held_out/shapes": 0.5})) + "\n")


def sheet(path: Path, size=(200, 80)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 90).convert("RGB").save(path)


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished reward training, with a score in a folder below it."""
    folder = tmp_path / "my run"
    logged(folder, range(1, 8), by_reward=True)
    for step in (2, 4, 6):
        sheet(folder / "samples" / f"step_{step:08d}.png")
    sheet(folder / "before_after.png")
    (folder / "lora.safetensors").write_bytes(b"x")
    options = {
        "task": "fill",
        "recipe": "a & b",
        "rewards": ["shapes"],
        "fuse_loras": ["icedit.safetensors"],
    }
    config = GRPOConfig(model="models/fill", output_dir=str(folder), max_steps=99, **options)
    run_folder.note(config, 7, COMMAND, folder / "lora.safetensors")
    scored(folder / "score")
    return folder


def scored(folder: Path) -> None:
    folder.mkdir()
    rows = [{"name": str(n), "task": "colour", "success": n % 2 == 0, "psnr": 20.0 + n} for n in range(5)]
    rows[3]["psnr"] = None
    values = {"figures": {"success": 0.6, "psnr": 21.8}, "notes": {"dino": "not here"}, "rows": rows}
    about = {"command": "diptych score -o score", "model": None, "steps": 12}
    (folder / "score.json").write_text(json.dumps(values | {"about": about}))
    sheet(folder / "contact-sheet.png")


class Page(HTMLParser):
    """What stands in a page: addresses, tags, texts of preformatted blocks. Every tag must be closed."""

    def __init__(self, path: Path):
        super().__init__()
        self.sources, self.tags, self.commands, self.open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag == "pre":
            self.commands.append("")
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.commands[-1] += data


def points(path: Path) -> dict[str, int]:
    """Points by chart, counted in the text."""
    text = path.read_text(encoding="utf-8")
    charts = re.findall(r'<svg class="curve"[^>]*aria-label="([^"]*)">(.*?)</svg>', text, re.S)
    return {name: inside.count("<circle") for name, inside in charts}


def test_every_value_that_was_logged_is_a_point(run):
    assert points(report.write(run)) == {
        "reward: shapes": 7 + 3,
        "loss": 7,
        "grad_norm": 7,
        "lr": 7,
        "psnr, images in order": 4,
    }


def test_the_page_loads_nothing_and_is_whole(run):
    page = Page(report.write(run))
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    assert len([source for source in page.sources if source.startswith("data:image")]) == 3 + 1 + 1
    assert "script" not in page.tags


def test_the_commands_of_the_page_can_be_run(run):
    use, go_on, score = Page(report.write(run)).commands
    parser = cli.build_parser()
    edit = parser.parse_args(shlex.split(use)[1:])
    assert edit.engine == "fill" and edit.model == "models/fill"
    assert edit.lora == ["icedit.safetensors", str(run / "lora.safetensors")]
    place, command = go_on.splitlines()
    assert shlex.split(place) == ["cd", os.getcwd()] and command == COMMAND
    assert parser.parse_args(shlex.split(command)[1:]).set == ["data=[pairs:my pairs]"]
    assert score == "diptych score -o score"


RESULTS = [
    ({"task": "multimodal"}, "model", "generate"),
    ({"task": "kontext", "model": "k"}, "lora.safetensors", "edit"),
    ({"task": "fill", "model": "k"}, "model", "edit"),
    ({"task": "sd_inpaint", "model": "k"}, "model", "inpaint"),
    ({"task": "glid", "model": "k"}, "lora.safetensors", ""),
]


@pytest.mark.parametrize(("config", "name", "command"), RESULTS, ids=[c["task"] for c, *_ in RESULTS])
def test_how_a_result_is_tried(config, name, command, tmp_path):
    result = tmp_path / name
    result.mkdir() if name == "model" else result.write_bytes(b"")
    found = report.use(run_folder.Run(tmp_path, 1, 1, config, config, result=result))
    assert bool(found) == bool(command)
    if command:
        assert cli.build_parser().parse_args(shlex.split(found)[1:]).command == command


def test_words_of_a_run_are_no_tags(tmp_path):
    logged(tmp_path, range(1, 3))
    values = {"config": {"task": "<script>", "prompt_template": "<img src=x>"}, "command": "a <b> && c"}
    (tmp_path / run_folder.NOTE).write_text(json.dumps(values))
    page = Page(report.write(tmp_path))
    assert not {"script", "img", "b"} & set(page.tags) and page.commands[-1].endswith("a <b> && c")


def test_a_run_that_is_not_finished_says_how_to_go_on(tmp_path):
    logged(tmp_path, range(1, 3))
    config = TrainConfig(output_dir=str(tmp_path), max_steps=99, recipe="mine")
    run_folder.note(config, 2, "diptych train mine --resume auto")
    text = report.write(tmp_path).read_text()
    assert "step 2 of 99, not finished" in text and "To go on:" in text
    run_folder.note(config, 2)
    assert "run it again with the same settings" in report.write(tmp_path).read_text()


def test_options_at_their_defaults_are_folded_away(tmp_path):
    logged(tmp_path, range(1, 3))
    run_folder.note(TrainConfig(output_dir=str(tmp_path), rank=3), 1)
    text = report.write(tmp_path).read_text()
    usual = text[text.index("<details>") :]
    assert "<td>rank</td><td>3</td>" in text and "<td>rank</td>" not in usual
    assert "<td>optimizer</td><td>prodigy</td>" in usual


def test_a_run_of_an_earlier_version_opens_too(tmp_path):
    """Without run.json: the configuration is the newest checkpoint's."""
    place = tmp_path / "checkpoints" / "step_00000004"
    place.mkdir(parents=True)
    values = {"step": 4, "config": {"task": "kontext", "max_steps": 9, "recipe": "old", "model": "m"}}
    (place / "state.json").write_text(json.dumps(values))
    (tmp_path / "old.safetensors").write_bytes(b"")
    text = report.write(tmp_path).read_text()
    assert "<h1>old</h1>" in text and "training of kontext, step 4 of 9, finished" in text


def test_both_stages_of_a_run_are_shown_also_where_only_the_first_was_made(tmp_path):
    logged(tmp_path / "align", range(1, 5))
    assert points(report.write(tmp_path))["loss"] == 4
    logged(tmp_path, range(1, 3))
    text = report.write(tmp_path).read_text()
    assert text.count('aria-label="loss"') == 2 and "Stage before: align" in text


def test_a_score_alone_opens(tmp_path):
    scored(tmp_path / "s")
    page = report.write(tmp_path / "s")
    assert points(page) == {"psnr, images in order": 4}
    text = page.read_text()
    assert (
        "<td>success</td><td>0.6</td>" in text and "not here" in text and text.count("<tr>") == 2 + 1 + 1 + 6
    )


def test_long_runs_are_thinned_and_keep_both_ends():
    many = [(step, 1.0) for step in range(1, 5001)]
    some = svg.thinned(many)
    assert len(some) == svg.MOST and some[0] == many[0] and some[-1] == many[-1]
    assert svg.thinned(many[:7]) == many[:7]
    drawn = svg.chart("loss", {"": dict(many)})
    assert drawn.count("<circle") == svg.MOST and len(drawn) < 40_000


def test_the_running_mean_is_that_of_the_values_before():
    means = svg._running_mean([(n, float(n)) for n in range(40)])  # over 2
    assert means[0] == (0, 0.0) and means[39] == (39, 38.5)


def test_many_values_get_a_running_mean_but_not_a_schedule():
    values = {"": {step: step % 3 for step in range(40)}}
    assert svg.chart("loss", values).count("<polyline") == 2
    assert svg.chart("lr", values, smooth=False).count("<polyline") == 1


def test_values_lie_between_the_ends_of_the_axes():
    drawn = svg.chart("x", {"a": {1: -3.0, 2: 5.0, 9: 1.0}, "b": {4: 0.0}})
    spots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert spots[0] == (svg.LEFT, svg.HEIGHT - svg.BOTTOM) and spots[1][1] == svg.TOP
    assert spots[2][0] == svg.WIDTH - svg.RIGHT
    middle = svg.TOP + (svg.HEIGHT - svg.BOTTOM - svg.TOP) * 5 / 8
    assert spots[3][1] == pytest.approx(middle, abs=0.06)
    assert svg.chart("none", {"a": {}}) == ""


def test_large_images_are_made_smaller_and_broken_ones_are_named(tmp_path):
    sheet(tmp_path / "large.png", (3000, 1000))
    assert (tmp_path / "large.png").stat().st_size > 2_000_000
    source, _ = html._embedded(tmp_path / "large.png")
    assert source.startswith("data:image/webp;base64,") and len(source) < 900_000
    (tmp_path / "broken.png").write_bytes(b"no")
    assert "broken.png cannot be read" in html.figure(tmp_path / "broken.png", "")


def test_a_report_that_cannot_be_written_ends_nothing(run, caplog):
    (run / report.NAME).mkdir()
    assert report.attempt(run) is None and "could not be written" in caplog.text


@pytest.mark.parametrize("name", ["none", "empty"])
def test_a_folder_without_a_run_is_refused_in_one_sentence(name, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "diptych train" in said
    assert not list((tmp_path / "empty").iterdir())


def test_the_command_writes_where_it_is_told_and_opens_it(run, tmp_path, capsys, monkeypatch):
    import webbrowser

    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    page = tmp_path / "page.html"
    assert cli.main(["report", str(run), "-o", str(page), "--open", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert result["report"] == str(page) and result["step"] == 7 and result["steps"] == 99
    assert result["command"] == COMMAND and result["scores"] == [str(run / "score")]
    assert opened == [page.as_uri()] and page.is_file() and not (run / report.NAME).exists()


def test_in_a_browser_it_opens_without_an_error_and_with_every_point(run):
    places = [os.environ.get("PLAYWRIGHT_CORE"), Path(__file__).parents[2] / "node_modules/playwright-core"]
    playwright = next((str(place) for place in places if place and Path(place).is_dir()), None)
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    chromium = next((found for name in names if name and (found := shutil.which(name))), None)
    if not (shutil.which("node") and playwright and chromium):
        pytest.skip("needs node, playwright-core (PLAYWRIGHT_CORE) and chromium")
    page = report.write(run)
    task = json.dumps({"playwright": playwright, "chromium": chromium, "file": str(page)})
    command = ["node", str(Path(__file__).parent / "report.cjs"), task]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["console"] == []
    assert all(url.startswith(("file:", "data:")) for url in seen["requests"])
    assert seen["title"] == "a & b" and "step 7 of 99, finished" in seen["text"]
    assert {name: count for name, count, _ in seen["points"]} == points(page)
    assert all(count == inside for _, count, inside in seen["points"])
    assert seen["images"] == [200] * 5
