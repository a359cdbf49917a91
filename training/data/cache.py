"""Content-keyed cache of text embeddings and latents in safetensors shards.

`ContentCache(folder, rank=0)`: `key in cache`, `get(key) -> dict[str, Tensor]` (memory-mapped), `put(key, tensors)`,
`flush()` (atomic), `refresh()` (see other processes' shards), `fill(items, encode, *, batch_size, description)` encodes what is
missing and survives a kill. Keys: `text_key(prompt, fingerprint)`, `image_key(image, fingerprint)` = sha256 of the content, the
size and the encoder's `fingerprint(module)`; never a step or a position.
"""

from __future__ import annotations
