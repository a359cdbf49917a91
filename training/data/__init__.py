"""Training data: read, mask, bucket, cache; skip what is broken and say so.

Public API (every module imports torch, numpy and PIL only; HF `datasets` inside the functions that read with it):

    sources.open_source(spec, *, seed=0) -> Source      # "folder:PATH", "magicbrush:ID_OR_PATH", "omniedit:GLOB?task=swap",
                                                        # "jsonl:FILE", "precomputed:FILE.json", "shapes:N?split=train&seed=0&size=64";
                                                        # a list of specs, each with an optional "@WEIGHT", is a mix
    Source: len(source), source[i] -> Sample (raises broken.BrokenSample), source.size(i) -> (height, width), source.name(i)
    sample.Sample: prompt, source, target, mask, caption, task, ...   (images float32 [H,W,3] 0..1, mask [H,W] 1 = repaint)
    sample.fit(sample, (height, width)) -> Sample       # cover + centre crop, the same geometry for every picture of the sample
    masks.random_masks(batch, height, width, *, kinds=masks.KINDS, generator) -> [B,H,W] float32 0/1
    buckets.bucket_sizes(area, ...) -> [(height, width)];  buckets.nearest(height, width, sizes)
    buckets.BucketBatchSampler(bucket_of, batch_size, *, seed, rank, world_size): endless, `start_at(step)` resumes
    cache.ContentCache(folder): get(key), put(key, tensors), flush(), fill(...);  cache.text_key, cache.image_key, cache.fingerprint
    broken.Broken(total, limit=0.05): record(name, reason), report();  broken.Tolerant(source, broken) never raises for one bad file
"""
