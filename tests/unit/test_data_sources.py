"""Every layout on disk is read into one Sample; what is broken is named, counted, and stops the run above 5
%.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from comfyui_diptych.training.data.sample import Broken, BrokenSample, Sample, fit
from comfyui_diptych.training.data.sources import Mix, open_source
from comfyui_diptych.training.data.specs import spec_of
from PIL import Image


def grey(value, size=(12, 8)):
    return Image.new("RGB", size, (value, value, value))


def write_pairs(folder, count=3):
    for i in range(count):
        grey(i).save(folder / f"{i:02}_source.png")
        grey(100 + i).save(folder / f"{i:02}_target.jpg", quality=100)
        (folder / f"{i:02}.txt").write_text(f"\ufeffmake it {i}\n", encoding="utf-8")


def table(folder, **columns):
    datasets = pytest.importorskip("datasets")
    features = {k: datasets.Image() for k, v in columns.items() if isinstance(v[0], Image.Image)}
    made = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        made = made.cast_column(name, feature)
    made.to_parquet(str(folder / "part-0.parquet"))


def test_a_folder_of_pairs(tmp_path):
    write_pairs(tmp_path)
    grey(255).convert("L").save(tmp_path / "01_mask.png")
    source = open_source(f"pairs:{tmp_path}")
    sample = source[1]
    assert len(source) == 3 and sample.prompt == "make it 1" and tuple(source[1].target.shape[:2]) == (8, 12)
    assert sample.source.shape == sample.target.shape == (8, 12, 3)
    assert sample.source[0, 0, 0] == pytest.approx(1 / 255) and sample.target.mean() == pytest.approx(
        101 / 255, abs=0.01
    )
    assert sample.mask.mean() == 1 and source[0].mask is None


def test_jsonl_carries_what_inpainting_needs(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    grey(255).save(tmp_path / "images/a.png")
    hole = np.zeros((4, 6), dtype=np.uint8)  # half the image's size: resized by nearest
    hole[:, :3] = 200
    Image.fromarray(hole).save(tmp_path / "masks/a.png")
    rows = [
        {"prompt": "\u6c34\u5f69", "image": "images/a.png", "mask": "masks/a.png"},
        {"prompt": "no mask", "file_name": "images/a.png", "mask": None, "class": "class", "weight": 2},
    ]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "data.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    source = open_source(f"jsonl:{tmp_path / 'data.jsonl'}")
    sample, bare = source[0], source[1]
    assert sample.prompt == "\u6c34\u5f69" and sample.image.shape == (8, 12, 3)
    assert (
        sample.mask.unique().tolist() == [0, 1] and sample.mask[:, :6].all() and not sample.mask[:, 6:].any()
    )
    assert (
        sample.masked_image[0, 0].tolist() == [0.5] * 3 and sample.masked_image[0, 11].tolist() == [1.0] * 3
    )
    assert sample.image_pil.size == sample.mask_pil.size == (12, 8)
    assert sample.image_path.is_file() and sample.mask_path.is_file()
    assert bare.mask is None and bare.role == "class" and bare.weight == 2


def test_a_bad_jsonl_line_is_named_with_its_number(tmp_path):
    grey(0).save(tmp_path / "a.png")
    good = json.dumps({"prompt": "p", "image": "a.png"})
    bad = ["{oops", '{"prompt": "p"}', '{"prompt": "p", "image": "missing.png"}', "[]"]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join([good, *bad]))
    source = open_source(f"jsonl:{file}")
    for line in range(2, 6):
        with pytest.raises(BrokenSample, match=rf"data\.jsonl:{line}: "):
            source[line - 1]


def test_magicbrush_loses_its_noise_rows(tmp_path):
    table(
        tmp_path,
        source_img=[grey(1, (32, 64))] * 2,
        target_img=[grey(2, (32, 64))] * 2,
        instruction=["a", "b"],
    )
    source = open_source(f"magicbrush:{tmp_path}")
    assert (
        source[1].target.shape == (62, 32, 3)
        and tuple(source[1].target.shape[:2]) == (62, 32)
        and source[1].prompt == "b"
    )
    assert open_source(f"magicbrush:{tmp_path}?crop=false")[0].source.shape == (64, 32, 3)


def test_omniedit_filters_tasks_and_draws_a_wording_by_content(tmp_path):
    n = 40
    table(
        tmp_path,
        src_img=[grey(1)] * n,
        edited_img=[grey(2)] * n,
        edited_prompt_list=[[f"short {i}", f"long {i}"] for i in range(n)],
        task=["swap", "removal"] * (n // 2),
    )
    every = open_source(f"omniedit:{tmp_path}/*.parquet")
    swaps = open_source(f"omniedit:{tmp_path}?task=swap")
    assert len(every) == n and len(swaps) == n // 2 and every[1].task == "removal"
    assert [swaps[i].prompt for i in range(5)] == [every[2 * i].prompt for i in range(5)]
    drawn = Counter(every[i].prompt.split()[0] for i in range(n))
    assert min(drawn.values()) > n // 5
    other = open_source(f"omniedit:{tmp_path}", seed=1)
    assert [other[i].prompt for i in range(n)] != [every[i].prompt for i in range(n)]
    with pytest.raises(ValueError, match="no task 'style'.*removal, swap"):
        open_source(f"omniedit:{tmp_path}?task=style")
    with pytest.raises(ValueError, match="no column 'source_img'.*src_img"):
        open_source(f"magicbrush:{tmp_path}")


def write_precomputed(folder, **wrong):
    tensors = {
        "prompt_embed": torch.zeros(5, 8, dtype=torch.bfloat16),
        "pooled_prompt_embeds": torch.zeros(1, 6),
        "text_ids": torch.zeros(5, 3),
        "masked_latents": torch.zeros(16, 4, 6),
        "mask_latents": torch.eye(4, 6)[None],
        **wrong,
    }
    keys = {"text_ids": "text_ids"}
    row = {"caption": "a red car"}
    for name, tensor in tensors.items():
        (folder / name).mkdir(exist_ok=True)
        torch.save(tensor, folder / name / "fill_0.pt")
        row[keys.get(name, f"{name}_path")] = "fill_0.pt"
    (folder / "index.json").write_text(json.dumps([row]))
    return open_source(f"precomputed:{folder / 'index.json'}")


def test_precomputed_flux_fill_tensors(tmp_path):
    source = write_precomputed(tmp_path)
    sample = source[0]
    assert sample.prompt == "a red car" and sample.mask.shape == (32, 48)
    assert (
        sample.encoded.pooled_prompt_embeds.shape == (6,)
        and sample.encoded.prompt_embed.dtype == torch.bfloat16
    )
    assert sample.mask.shape == (32, 48) and sample.mask[8:16, 8:16].all() and not sample.mask[8:16, :8].any()


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"mask_latents": torch.zeros(1, 4, 4)}, r"mask_latents is \[1, 4, 4\] where \[1, 4, 6\]"),
        ({"text_ids": torch.zeros(4, 3)}, r"text_ids is \[4, 3\]"),
        ({"masked_latents": torch.zeros(16, 4, 6, dtype=torch.int32)}, "int32"),
        ({"masked_latents": torch.full((16, 4, 6), torch.nan)}, "NaN"),
        ({"prompt_embed": {"a": torch.zeros(1)}}, "holds a dict"),
    ],
)
def test_precomputed_tensors_of_the_wrong_kind_are_refused(tmp_path, wrong, reason):
    with pytest.raises(BrokenSample, match=reason):
        write_precomputed(tmp_path, **wrong)[0]


def test_precomputed_rows_of_other_systems_and_of_no_folder_of_ours(tmp_path):
    write_precomputed(tmp_path)
    index = tmp_path / "index.json"
    text = index.read_text()
    (tmp_path / "masked_latents" / "sub").mkdir()
    (tmp_path / "masked_latents" / "fill_0.pt").rename(tmp_path / "masked_latents" / "sub" / "fill_0.pt")
    row = json.loads(text)[0] | {"masked_latents_path": "sub\\fill_0.pt"}
    index.write_bytes(json.dumps([row]).encode("utf-16"))
    assert open_source(f"precomputed:{index}?inside=true")[0].encoded.masked_latents.shape == (16, 4, 6)
    outside = row | {"text_ids": "../text_ids/fill_0.pt"}
    index.write_text(
        json.dumps([outside, row | {"layout": "left"}, row | {"weight": "nan"}, row | {"caption": 3}])
    )
    open_source(f"precomputed:{index}")[0]
    source = open_source(f"precomputed:{index}?inside=true")
    for number, reason in enumerate(
        ("outside of the data folder", "diptych or inpaint", "0 to 1000", "'caption'")
    ):
        with pytest.raises(BrokenSample, match=reason):
            source[number]


def test_a_packed_tensor_file_is_not_unpacked(tmp_path):
    import zipfile

    source, path = write_precomputed(tmp_path), tmp_path / "masked_latents" / "fill_0.pt"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(BrokenSample, match="not a plain tensor file"):
        source[0]


def test_precomputed_files_that_would_run_code_are_refused(tmp_path):
    source = write_precomputed(tmp_path)

    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("boom",))

    (tmp_path / "text_ids/fill_0.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(BrokenSample, match="not a plain tensor file"):
        source[0]
    assert not tmp_path.joinpath("ran").exists()


class Numbers:
    """A source of n samples named by prefix and number; `bad` ones are broken."""

    def __init__(self, prefix, n, bad=()):
        self.prefix, self.n, self.bad = prefix, n, bad

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i in self.bad:
            raise BrokenSample(f"{self.prefix}{i}", "torn")
        return Sample(f"{self.prefix}{i}")


def test_a_mix_keeps_its_shares_and_sees_everything():
    mix = Mix([Numbers("a", 10), Numbers("b", 30)], [0.75, 0.25])
    prompts = [mix[i].prompt for i in range(len(mix))]
    assert Counter(p[0] for p in prompts) == {"a": 90, "b": 30} and len(set(prompts)) == 40
    plain = open_source([Numbers("a", 10), Numbers("b", 30)])
    assert len(plain) == 40 and plain[9].prompt == "a9" and plain[10].prompt == "b0"


def test_a_weighted_mix_is_written_in_one_line_per_source(tmp_path):
    for name, count in (("a", 2), ("b", 4)):
        (tmp_path / name).mkdir()
        write_pairs(tmp_path / name, count)
    mix = open_source([f"pairs:{tmp_path / 'a'}@0.5", f"pairs:{tmp_path / 'b'}@.5"])
    assert mix.counts == [4, 4]
    with pytest.raises(ValueError, match="behind all or none"):
        open_source([f"pairs:{tmp_path / 'a'}@0.5", f"pairs:{tmp_path / 'b'}"])


def read_all(source):
    """Every readable sample, and the closing sentence about the others."""
    broken, samples = Broken(len(source)), []
    for index in range(len(source)):
        try:
            samples.append(source[index])
        except BrokenSample as error:
            broken.record(error)
    return samples, broken.close()


def test_five_percent_may_be_broken_and_is_named():
    samples, sentence = read_all(Numbers("x", 40, bad=(3, 7)))
    assert [sample.prompt for sample in samples] == [f"x{i}" for i in range(40) if i not in (3, 7)]
    assert sentence == "2 of 40 examples were broken and skipped: x3: torn; x7: torn"
    assert read_all(Numbers("x", 40))[1] == ""


@pytest.mark.parametrize("count, listed", [(3, "x0: torn; x1: torn; x2: torn"), (40, "and 1 more")])
def test_more_than_five_percent_stops_with_the_list(count, listed):
    with pytest.raises(ValueError, match=rf"of 40.*more than 5%.*{listed}") as stopped:
        read_all(Numbers("x", 40, bad=range(count)))
    assert not isinstance(stopped.value, BrokenSample)


def test_missing_and_torn_files_of_a_pair_are_named(tmp_path):
    write_pairs(tmp_path, 4)
    (tmp_path / "00.txt").unlink()
    (tmp_path / "01_source.png").unlink()
    (tmp_path / "02_target.jpg").write_bytes((tmp_path / "02_target.jpg").read_bytes()[:200])
    source = open_source(f"pairs:{tmp_path}")
    for index, reason in enumerate(
        ["00.txt", "01_source.png is missing", "cannot be decoded|not a readable"]
    ):
        with pytest.raises(BrokenSample, match=reason):
            source[index]
    assert source[3].prompt == "make it 3"


def test_broken_samples_survive_the_trip_from_a_worker():
    error = pickle.loads(pickle.dumps(BrokenSample("a.png", "torn")))  # noqa: S301
    assert (error.name, error.reason, str(error)) == ("a.png", "torn", "a.png: torn")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("folder/of/pairs", "write KIND:LOCATION"),
        ("pairs:FOLDER?mood=good", "mood"),
        ("pairs:EMPTY", "holds no pairs"),
    ],
)
def test_wrong_specs_say_what_to_write(tmp_path, spec, message):
    write_pairs(tmp_path)
    (tmp_path / "empty").mkdir()
    spec = spec.replace("FOLDER", str(tmp_path)).replace("EMPTY", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=message):
        open_source(spec)


def test_fit_applies_one_geometry_to_all_images():
    ramp = torch.linspace(0, 1, 40)[None, :, None].expand(20, 40, 3)
    sample = Sample("p", target=ramp, source=ramp[::2, ::2], mask=(ramp[..., 0] > 0.5).float())
    cropped = fit(sample, (16, 16))
    assert cropped.target.shape == cropped.source.shape == (16, 16, 3) and cropped.mask.shape == (16, 16)
    assert cropped.target[8, :, 0].diff().min() > 0 and cropped.target[8, 0, 0] == pytest.approx(
        0.26, abs=0.02
    )
    assert (cropped.source - cropped.target).abs().max() < 0.03
    assert torch.equal(cropped.mask[8], (torch.arange(16) >= 8).float())
    stretched = fit(sample, (16, 16), policy="stretch")
    assert stretched.target[8, 0, 0] < 0.05 and stretched.target[8, -1, 0] > 0.95


def test_shapes_are_a_source_like_any_other():
    source = open_source("shapes:5?split=test&seed=3&size=32")
    sample = source[4]
    assert (
        len(source) == 5
        and sample.target.shape == (32, 32, 3)
        and tuple(source[0].target.shape[:2]) == (32, 32)
    )
    outside = (1 - sample.mask)[..., None]
    assert torch.equal(sample.source * outside, sample.target * outside)
    assert open_source("shapes:5?split=test&seed=3&size=32&task=inpaint")[4].prompt == sample.caption


def test_the_base_world_is_captions_and_copies_with_holes_and_no_instruction():
    source = open_source("shapes:400?task=base&seed=3&size=32")
    samples = [source[i] for i in range(len(source))]
    single = [s for s in samples if s.source is None]
    copies = [s for s in samples if s.source is not None and torch.equal(s.source, s.target)]
    assert len(single) / 400 == pytest.approx(0.35, abs=0.08)
    assert len(copies) / 400 == pytest.approx(0.35, abs=0.08)
    assert all(s.prompt == s.caption for s in single) and not any(s.caption in s.prompt for s in copies)
    assert all(s.literal and set(s.mask.unique().tolist()) <= {0.0, 1.0} and s.mask.any() for s in samples)
    again = open_source("shapes:400?task=base&seed=3&size=32")[7]
    assert again.prompt == samples[7].prompt and torch.equal(again.mask, samples[7].mask)
    instructions = {open_source("shapes:400?seed=3&size=32")[i].prompt for i in range(400)}
    assert not any(i in s.prompt for s in samples for i in instructions)


def test_system_files_and_every_suffix_in_a_folder_of_pairs(tmp_path):
    for stem, suffix in (("a", ".tif"), ("b", ".jfif"), ("c", ".GIF"), ("d.v2", ".Png")):
        kind = {".tif": "TIFF", ".jfif": "JPEG", ".gif": "GIF", ".png": "PNG"}[suffix.lower()]
        for role in ("source", "target"):
            grey(9).save(tmp_path / f"{stem}_{role}{suffix}", kind)
            (tmp_path / f"._{stem}_{role}{suffix}").write_bytes(b"\0\5\x16\7")
        (tmp_path / f"{stem}.TXT").write_text("make it red")
        (tmp_path / f"._{stem}.txt").write_bytes(b"\xff" * 60)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / name).write_bytes(b"\0")
    source = open_source(spec_of(tmp_path))
    assert [source[i].prompt for i in range(len(source))] == ["make it red"] * 4


def test_names_may_be_spelt_with_composed_or_separate_accents(tmp_path):
    grey(1).save(tmp_path / "e\u0301_source.png")
    grey(1).save(tmp_path / "\u00e9_target.png")
    (tmp_path / "\u00e9.txt").write_text("x")
    assert open_source(f"pairs:{tmp_path}")[0].prompt == "x"


def test_an_unreadable_suffix_and_two_files_for_one_part_are_named(tmp_path):
    write_pairs(tmp_path, 2)
    (tmp_path / "00_source.png").unlink()
    (tmp_path / "00_source.svg").write_text("<svg/>")
    grey(1).save(tmp_path / "01_source.webp")
    source = open_source(f"pairs:{tmp_path}")
    with pytest.raises(BrokenSample, match=r"\.svg images are not read here"):
        source[0]
    with pytest.raises(BrokenSample, match="both 01_source.png and 01_source.webp are there"):
        source[1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_words_in_any_unicode_encoding(tmp_path, encoding, newline):
    write_pairs(tmp_path, 1)
    (tmp_path / "00.txt").write_bytes(f"make{newline}it bl\u00e5{newline}".encode(encoding))
    assert open_source(f"pairs:{tmp_path}")[0].prompt == "make it bl\u00e5"
    row = json.dumps({"file_name": "00_source.png", "text": "bl\u00e5\u2028x"}, ensure_ascii=False)
    for name, text in (
        ("m.jsonl", newline.join([row, row])),
        ("m.csv", f"file_name,text{newline}00_source.png,bl\u00e5"),
    ):
        (tmp_path / name).write_bytes(text.encode(encoding))
        source = open_source(f"jsonl:{tmp_path / name}")
        assert source[len(source) - 1].prompt.startswith("bl\u00e5") and len(source) == (
            2 if name == "m.jsonl" else 1
        )


@pytest.mark.parametrize(
    "data, reason",
    [
        ("gr\u00fcn".encode("latin-1"), r"00.txt is not UTF-8 in line 1 \(byte 0xFC\)"),
        ("a\nb\ngr\u00fcn".encode("latin-1"), "line 3"),
        ("text".encode("utf-16-le"), "NUL characters"),
        (b"\xff\xfea", "damaged text"),
        (b" \n", "00.txt is empty"),
        (b"x" * 70000, "longer than the 64 KB"),
    ],
)
def test_words_in_an_unknown_encoding_are_named_with_their_line(tmp_path, data, reason):
    write_pairs(tmp_path, 1)
    (tmp_path / "00.txt").write_bytes(data)
    with pytest.raises(BrokenSample, match=reason):
        open_source(f"pairs:{tmp_path}")[0]


def test_metadata_of_hugging_face_image_folders(tmp_path):
    (tmp_path / "train").mkdir()
    grey(9).save(tmp_path / "train/a.png")
    grey(255).save(tmp_path / "train/m.png")
    rows = [
        {"file_name": "train/a.png", "text": "a red circle"},
        {"file_name": "train\\a.png", "prompt": "a red circle", "mask": "train\\m.png"},
        {"image": ".\\train\\a.png", "caption": "a red circle", "source": "train/a.png", "weight": "2"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(spec_of(tmp_path))
    samples = [source[i] for i in range(3)]
    assert {sample.prompt for sample in samples} == {"a red circle"}
    assert samples[1].mask.all() and samples[2].source is not None and samples[2].weight == 2
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(
        'file_name,text\ntrain/a.png,"a red, round\ncircle"\n\ntrain/a.png\n'
    )
    source = open_source(spec_of(tmp_path))
    assert source[0].prompt == "a red, round\ncircle" and tuple(source[0].target.shape[:2]) == (8, 12)
    with pytest.raises(BrokenSample, match="metadata.csv:5: 1 columns where the first line names 2"):
        source[1]


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"prompt": "a", "image": "1.png", "mask": 5}', "mask is 5: write text"),
        ('{"prompt": "a", "image": "1.png", "source": ["x"]}', "source is"),
        ('{"prompt": {"a": 1}, "image": "1.png"}', "prompt is"),
        ('{"prompt": "a", "image": 1}', "image is 1"),
        ('{"image": "1.png"}', "'prompt' or 'text' or .* is missing"),
        ('{"prompt": "a"}', "'image' or 'file_name' .* is missing"),
        ('{"prompt": "a", "image": "1.png", "weight": NaN}', "weight is nan"),
        ('{"prompt": "a", "image": "1.png", "weight": -5}', "weight is -5"),
        ('{"prompt": "a", "image": "1.png", "weight": true}', "weight is True"),
        ('{"prompt": "a", "image": "1.png", "weight": 1e999}', "weight is inf"),
        ('{"prompt": "\\ud800", "image": "1.png"}', "lone surrogate"),
        ('{"prompt": "a", "image": "\\ud800.png"}', "lone surrogate"),
        ('{"prompt": "a", "image": "a\\u0000.png"}', "missing"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "' + "a" * 2**20 + '"}', "longer than the 1 MB"),
        ("1" * 5000, "not a line of JSON"),
        ("5", "not a JSON object"),
        ('{"prompt": "a", "image": "1.png", "mask": "black.png"}', "the mask black.png is empty"),
    ],
)
def test_a_row_of_the_wrong_kind_is_broken_and_the_run_goes_on(tmp_path, row, reason):
    grey(3).save(tmp_path / "1.png")
    grey(0).save(tmp_path / "black.png")
    (tmp_path / "d.jsonl").write_text(row + '\n{"prompt": "a", "image": "1.png"}')
    source = open_source(f"jsonl:{tmp_path / 'd.jsonl'}")
    with pytest.raises(BrokenSample, match=rf"d\.jsonl:1: .*{reason}") as error:
        source[0]
    assert len(str(error.value)) < 500 and source[1].prompt == "a"


@pytest.mark.parametrize(
    "where", ["../x.png", "a/../../x.png", "..\\x.png", "/etc/x.png", "C:\\x.png", "\\\\server\\x.png"]
)
def test_a_row_leaves_its_folder_only_where_that_is_allowed(tmp_path, where):
    folder = tmp_path / "data"
    folder.mkdir()
    grey(3).save(tmp_path / "x.png")
    (folder / "d.jsonl").write_text(json.dumps({"prompt": "a", "image": where}))
    with pytest.raises(BrokenSample, match="outside of the data folder"):
        open_source(f"jsonl:{folder / 'd.jsonl'}?inside=true")[0]
    source = open_source(f"jsonl:{folder / 'd.jsonl'}")
    if where == "../x.png":
        assert source[0].target.shape == (8, 12, 3)


def test_a_thin_stroke_of_a_mask_survives_every_resizing(tmp_path):
    grey(1, (64, 64)).save(tmp_path / "a.png")
    mask = np.zeros((512, 512), np.uint8)
    mask[:, 301] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "a", "image": "a.png", "mask": "m.png"}))
    sample = open_source(f"jsonl:{tmp_path / 'd.jsonl'}")[0]
    assert sample.mask.sum() == 64 and sample.mask[:, 301 // 8].all()
    for policy in ("crop", "stretch"):
        assert fit(sample, (16, 16), policy=policy).mask[:, 301 // 32].all()


def test_captioned_images_are_a_source_and_without_words_broken(tmp_path):
    grey(7).save(tmp_path / "a.webp")
    grey(7).save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("a grey wall")
    source = open_source(f"images:{tmp_path}")
    assert len(source) == 2 and source[0].prompt == "a grey wall" and source[0].source is None
    assert open_source(f"images:{tmp_path}?edit=true")[0].source is not None
    with pytest.raises(BrokenSample, match="b.txt with the words is missing"):
        source[1]


def test_an_image_is_not_its_own_mask(tmp_path):
    """ComfyUI's mask editor hides the painted part under alpha, where nothing is read."""
    grey(3).save(tmp_path / "a.png")
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "p", "image": "a.png", "mask": "a.png"}))
    with pytest.raises(BrokenSample, match="image and mask are one file"):
        open_source(f"jsonl:{tmp_path / 'd.jsonl'}")[0]


def test_instructions_that_are_no_text_are_broken_rows(tmp_path):
    table(tmp_path, source_img=[grey(1)] * 2, target_img=[grey(2)] * 2, instruction=[5, None])
    source = open_source(f"magicbrush:{tmp_path}")
    for index in range(2):
        with pytest.raises(BrokenSample, match="instruction is empty or no text"):
            source[index]


def brush(folder, name, colour, count=1):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    from pyarrow import parquet

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": None}
    rows = [{"source_img": image, "target_img": image, "instruction": name}] * count
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)


@pytest.mark.parametrize(
    "names",
    [
        ["data/{}-00000-of-00001.parquet", "data/{}-00001-of-00002.parquet"],
        ["{}/0000.parquet", "default/{}/0001.parquet"],
    ],
)
def test_files_named_for_splits_are_read_by_split(tmp_path, names):
    """What is held out does not slip into the training data."""
    for split in ("train", "dev", "test"):
        brush(tmp_path, names[0].format(split), "red")
    brush(tmp_path, names[1].format("train"), "blue")
    folder = f"magicbrush:{tmp_path}"
    words = {row for row in (open_source(folder)[i].prompt for i in range(len(open_source(folder))))}
    assert len(open_source(folder)) == 3 and not any("test" in word for word in words)
    assert (
        len(open_source(f"{folder}?split=train")) == 2 and len(open_source(f"{folder}?split=dev+test")) == 2
    )
    with pytest.raises(ValueError, match="no split 'validation': choose among dev, test, train"):
        open_source(f"{folder}?split=validation")


def test_files_of_no_split_are_all_read_and_a_damaged_one_is_a_sentence(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        brush(tmp_path, name, "red")
    assert len(open_source(f"magicbrush:{tmp_path}")) == 2
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no such thing PAR1")
    with pytest.raises(ValueError, match="cannot be read .*: get it again"):
        open_source(f"magicbrush:{tmp_path}")


def test_a_replaced_image_changes_what_a_cache_knows(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    (tmp_path / "d.jsonl").write_text('{"prompt": "x", "image": "a.png"}')
    before = open_source(f"jsonl:{tmp_path / 'd.jsonl'}").fingerprint
    assert before == open_source(f"jsonl:{tmp_path / 'd.jsonl'}").fingerprint
    Image.new("RGB", (24, 16), "blue").save(tmp_path / "a.png")
    assert before != open_source(f"jsonl:{tmp_path / 'd.jsonl'}").fingerprint


def test_one_prompt_serves_images_without_words(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "b.txt").write_text("its own words")
    source = open_source(f"images:{tmp_path}?prompt=a photo of sks dog")
    assert [source[i].prompt for i in range(2)] == ["a photo of sks dog", "its own words"]
    plain = open_source(f"images:{tmp_path}")
    assert plain.fingerprint != source.fingerprint
    assert open_source(f"images:{tmp_path}?edit=true").fingerprint != plain.fingerprint
    with pytest.raises(BrokenSample, match="a.txt"):
        plain[0]


@pytest.mark.parametrize("frame", [(1, 4000), (4000, 1)])
@pytest.mark.parametrize("policy", ["crop", "stretch"])
def test_a_thin_image_takes_no_more_memory_than_a_square_one(frame, policy, monkeypatch):
    largest = []
    real = torch.nn.functional.interpolate
    monkeypatch.setattr(
        torch.nn.functional,
        "interpolate",
        lambda *a, **k: largest.append(real(*a, **k).numel()) or real(*a, **k),
    )
    sample = Sample("p", target=torch.rand(*frame, 3), source=torch.rand(9, 9, 3), mask=torch.ones(9, 9))
    made = fit(sample, (64, 64), policy=policy)
    assert made.target.shape == made.source.shape == (64, 64, 3) and bool(made.mask.all())
    assert max(largest) <= 3 * 64 * 4000
