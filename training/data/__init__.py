"""Training data: the way of a row from file to batch.

1. `sources.open_source(spec)`: a `Source`, or a weighted mix of several. `source[i]` is a `Sample` or raises
   `BrokenSample`. The layouts: `files.py` (folders, tables; their text in `text_files.py`), `hub.py`
   (Hugging Face datasets), `precomputed.py`, the shapes world. `specs.py` finds the spec of a folder.
2. `sample.Sample`: one example, its images and masks; `sample.Broken` counts those that cannot be read.
3. `preprocess.Corpus`: its rows as a model sees them: size, diptych, mask (`masks.py`), prompt.
4. `encode.py`: latents and embeddings in the caches (`cache.py`), and an `Entry` for every row.
5. `dataset.Batches`: tensors of any rows; which ones make up step n says `buckets.py`.

`prior.py` has the model make class images before it is trained. A task of `tasks/` is handed in; nothing here
imports one. Importing needs torch, numpy and PIL; `datasets` only where a source reads with it.
"""
