"""Training data: read, mask, bucket, cache; skip what is broken and say so.

- `sources.open_source(spec, *, seed=0, limit=0)`: one `Source`, or a weighted mix of several: folders of
  pairs or captioned images, JSONL and CSV, MagicBrush, OmniEdit, precomputed Flux Fill tensors, the shapes
  world. `source[i]` is a `Sample` or raises `broken.BrokenSample`; `source.size(i)` is (height, width);
  `source.name(i)` is for people.
- `sample.Sample`: prompt, source, target (= image), mask, caption, ...; images float32 [H,W,3] in 0..1, masks
  float32 [H,W] with 1 = repaint. `sample.fit(sample, (height, width))` brings all of them to one size. Files
  are opened by `models/image_files.py` alone.
- `folders`: which files of a folder count, and text in any Unicode encoding. `rows.Rows`: JSONL and CSV.
- `masks.random_masks(batch, height, width, kinds=..., generator=...)` and `masks.draw` for one.
- `buckets.bucket_sizes`, `buckets.nearest`, `buckets.BucketBatchSampler` (endless; `start_at(step)` resumes).
- `cache.ContentCache(folder)`: get, put, flush, fill; `cache.text_key`, `cache.image_key`,
  `cache.fingerprint`.
- `broken.Broken(total)` counts `BrokenSample`s and stops a run above 5 %.

Importing these needs torch, numpy and PIL; Hugging Face `datasets` only where a source reads with it.
"""
