"""Every layout on disk is read into one Sample; what is broken is named, counted, and stops the run above 5
%.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from comfyui_diptych.training.data.broken import Broken, BrokenSample
from comfyui_diptych.training.data.sample import Sample, fit
from comfyui_diptych.training.data.sources import Mix, open_source
from PIL import Image


def picture(value, size=(12, 8)):
    return Image.new("RGB", size, (value, value, value))


def write_pairs(folder, count=3):
    for i in range(count):
        picture(i).save(folder / f"{i:02}_source.png")
        picture(100 + i).save(folder / f"{i:02}_target.jpg", quality=100)
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
    picture(255).convert("L").save(tmp_path / "01_mask.png")
    source = open_source(f"pairs:{tmp_path}")
    sample = source[1]
    assert len(source) == 3 and sample.prompt == "make it 1" and source.size(1) == (8, 12)
    assert sample.source.shape == sample.target.shape == (8, 12, 3)
    assert sample.source[0, 0, 0] == pytest.approx(1 / 255) and sample.target.mean() == pytest.approx(
        101 / 255, abs=0.01
    )
    assert sample.mask.mean() == 1 and source[0].mask is None


def test_jsonl_carries_what_inpainting_needs(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    picture(255).save(tmp_path / "images/a.png")
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
    picture(0).save(tmp_path / "a.png")
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
        source_img=[picture(1, (32, 64))] * 2,
        target_img=[picture(2, (32, 64))] * 2,
        instruction=["a", "b"],
    )
    source = open_source(f"magicbrush:{tmp_path}")
    assert source[1].target.shape == (62, 32, 3) and source.size(1) == (62, 32) and source[1].prompt == "b"
    assert open_source(f"magicbrush:{tmp_path}?crop=false")[0].source.shape == (64, 32, 3)


def test_omniedit_filters_tasks_and_draws_a_wording_by_content(tmp_path):
    n = 40
    table(
        tmp_path,
        src_img=[picture(1)] * n,
        edited_img=[picture(2)] * n,
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
    assert sample.prompt == "a red car" and source.size(0) == (32, 48)
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
    assert len(open_source([f"pairs:{tmp_path / 'a'}", f"pairs:{tmp_path / 'b'}"], limit=1)) == 2
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


def test_fit_applies_one_geometry_to_all_pictures():
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
    assert len(source) == 5 and sample.target.shape == (32, 32, 3) and source.size(0) == (32, 32)
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
