"""The canvas in files: what is written comes back, at any coordinates, and no kill loses any of it."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from comfyui_diptych.models.outpaint import store as room
from comfyui_diptych.models.outpaint.store import CanvasStore, Region


@pytest.fixture(autouse=True)
def small_patches(monkeypatch):
    monkeypatch.setattr(room, "PATCH", 32)


@pytest.fixture
def store(tmp_path):
    return CanvasStore(tmp_path / "canvas")


def noise(height: int, width: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    """[1,H,W,C] of 8-bit values, as ComfyUI loads files."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, height, width, channels), generator=generator).float() / 255


@pytest.mark.parametrize("x, y", [(20, 25), (-45, -70), (-10, 5), (-32, 32)])
def test_what_is_written_across_patches_comes_back_bit_for_bit(store, x, y):
    image = noise(40, 50)
    assert store.write(image, x, y) == Region(x, y, 50, 40)
    again, mask = CanvasStore(store.folder).read(Region(x, y, 50, 40))
    assert torch.equal(again, image) and not mask.any()
    assert len(store.state()["patches"]) >= 4
    around, mask = store.read(Region(x - 3, y - 2, 56, 44))
    assert torch.equal(around[:, 2:42, 3:53], image) and int(mask.sum()) == 56 * 44 - 50 * 40
    assert torch.equal(around[mask == 1], torch.full((56 * 44 - 50 * 40, 3), 0.5))


def test_the_export_is_the_box_around_all_that_is_known(store):
    store.write(noise(10, 10), 0, 0)
    store.write(noise(5, 7, 1), -40, 100)
    image, mask, region = store.export()
    assert region == store.bounds == Region(-40, 0, 50, 105)
    assert tuple(image.shape) == (1, 105, 50, 3) and int((mask == 0).sum()) == 100 + 35
    assert torch.equal(image[:, :10, 40:], noise(10, 10)) and torch.equal(image[:, 100:, :7], noise(5, 7, 1))


def test_masks_and_alpha_say_what_is_written_and_known_pixels_may_stay(store):
    first, second = noise(20, 20), noise(20, 20, 1)
    mask = torch.zeros(1, 20, 20)
    mask[:, :, :10] = 1
    store.write(first, 0, 0, mask)
    assert store.bounds == Region(0, 0, 10, 20)
    store.write(second, 0, 0, over="unknown")
    image, unknown = store.read(Region(0, 0, 20, 20))
    assert not unknown.any()
    assert torch.equal(image[:, :, :10], first[:, :, :10])
    assert torch.equal(image[:, :, 10:], second[:, :, 10:])
    clear = torch.cat([first, (noise(20, 20, 2)[..., :1] > 0.5).float()], dim=-1)
    store.write(clear, 0, 0, over="start over")
    image, unknown = store.read(Region(0, 0, 20, 20))
    assert torch.equal(unknown[0] == 0, clear[0, ..., 3] == 1)
    assert torch.equal(image[unknown == 0], first[unknown == 0])


def test_the_state_is_json_that_says_the_same_for_the_same_content(store):
    store.write(noise(40, 40), -5, -5)
    text = (store.folder / room.STATE).read_text(encoding="utf-8")
    state = json.loads(text)
    columns = ("-1", "0", "1")
    assert state["bounds"] == [-5, -5, 40, 40]
    assert set(state["patches"]) == {f"{column},{row}" for column in columns for row in columns}
    store.write(noise(40, 40, 3), -5, -5)
    assert (store.folder / room.STATE).read_text(encoding="utf-8") != text
    store.write(noise(40, 40), -5, -5, over="start over")
    assert (store.folder / room.STATE).read_text(encoding="utf-8") == text
    files = {path.name for path in store.folder.glob("*.png")}
    assert files == set(state["patches"].values())


def kill_at(number: int) -> None:
    """Let this process die right before its file operation of that number, buffers unwritten."""
    count = 0

    def step(*_):
        nonlocal count
        count += 1
        if count == number:
            os._exit(9)

    real = os.fsync
    os.fsync = lambda file: (step(), real(file))[1]
    watched = ("open", "os.rename", "os.remove", "os.mkdir")
    sys.addaudithook(lambda event, arguments: step() if event in watched else None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child to kill is a fork")
@pytest.mark.parametrize("over", ["all", "start over"])
def test_a_kill_at_any_file_operation_leaves_the_canvas_before_or_after(store, over):
    before, after = noise(50, 50), noise(50, 50, 1)
    region, killed, seen = Region(-20, -20, 60, 60), 0, set()
    for number in range(1, 200):
        store.write(before, -20, -20, over="start over")
        old = store.read(region)[0]
        child = os.fork()
        if not child:
            kill_at(number)
            CanvasStore(store.folder).write(after, -10, -10, over=over)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        image, unknown = CanvasStore(store.folder).read(region)
        new = old.clone()
        if over == "start over":
            new[:] = 0.5
        new[:, 10:, 10:] = after
        assert torch.equal(image, old) or torch.equal(image, new), f"killed at operation {number}"
        seen.add("old" if torch.equal(image, old) else "new")
        if status == 0:
            break
        killed += 1
    assert status == 0 and killed >= 15 and seen == {"old", "new"}
    files = {path.name for path in store.folder.iterdir()}
    assert files == {
        room.STATE,
        *store.state()["patches"].values(),
    }  # nothing is left over after the next write


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda s: s.export(), "canvas 'canvas' is empty"),
        (lambda s: s.write(torch.rand(2, 8, 8, 3), 0, 0), "image has 2 items"),
        (lambda s: s.write(torch.rand(1, 8, 8, 3), 0, 0, torch.ones(1, 4, 4)), "mask is 4x4 but the image"),
        (lambda s: s.write(torch.rand(1, 8, 8, 3), 0, 0, over="twice"), "over is 'twice'"),
        (lambda s: s.read(Region(0, 0, 0, 5)), "the region is 0x5"),
        (lambda s: s.read(Region(0, 0, 10**5, 10**5)), "read at most"),
        (lambda s: s.read(Region(2**25, 0, 5, 5)), "px from the origin"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(store, act, words):
    with pytest.raises(ValueError, match=words):
        act(store)


def test_damaged_files_are_named(store):
    store.write(noise(8, 8), 0, 0)
    patch = next(store.folder.glob("*.png"))
    patch.write_bytes(patch.read_bytes()[:40])
    with pytest.raises(ValueError, match="cannot be read"):
        store.read(Region(0, 0, 8, 8))
    (store.folder / room.STATE).write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="not a canvas of this version"):
        store.read(Region(0, 0, 8, 8))


def test_a_state_file_cannot_name_files_elsewhere(store, tmp_path):
    store.write(noise(32, 32), 0, 0)
    state = store.state()
    outside = next(store.folder.glob("*.png")).rename(tmp_path / "outside.png")
    state["patches"]["0,0"] = f"../{outside.name}"
    (store.folder / room.STATE).write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read"):
        store.read(Region(0, 0, 32, 32))


def test_the_node_reads_writes_and_exports(tmp_path, monkeypatch):
    from comfyui_diptych import NODE_CLASS_MAPPINGS

    monkeypatch.chdir(tmp_path)
    node = NODE_CLASS_MAPPINGS["DiptychCanvasStore"]
    region = {"x": -8, "y": 4, "width": 30, "height": 20, "over": "all"}
    before = node.IS_CHANGED(canvas="c", **region)
    name, image, mask, *place = node().run(canvas="c", action="write", image=noise(10, 12), **region)
    assert name == "c" and torch.equal(image, noise(10, 12)) and not mask.any() and place == [-8, 4, 12, 10]
    assert node.IS_CHANGED(canvas="c", **region) != before
    _, image, mask, *place = node().run(canvas="c", action="read", **region)
    assert tuple(image.shape) == (1, 20, 30, 3) and int(mask.sum()) == 600 - 120
    _, image, mask, *place = node().run(canvas="c", action="export", **region)
    assert torch.equal(image, noise(10, 12)) and place == [-8, 4, 12, 10]
    for wrong, words in (("../up", "canvas is '../up'"), ("", "canvas is ''")):
        with pytest.raises(ValueError, match=words):
            node().run(canvas=wrong, action="read", **region)
    with pytest.raises(ValueError, match="image is missing"):
        node().run(canvas="c", action="write", **region)
