"""Kinds of tokens, what is lost of a prompt, how it is told; for ComfyUI's tokenizers see tests/comfyui."""

import torch
from comfyui_diptych.models.inspect import tokens
from comfyui_diptych.models.inspect.tokens import BEYOND, CUT, END, PADDING, START, TEXT, Encoded, Token

WORDS = {0: "<pad>", 1: "</s>", 7: "red</w>", 8: "circle</w>", 90: "<s>", 91: "<e>"}


def clip(count, limit=77, **options):
    """Chunks of `count` words as ComfyUI's CLIP tokenizers make them."""
    chunks = []
    for begin in range(0, max(count, 1), limit - 2):
        words = [(7, 1.0, k + 1) for k in range(begin, min(begin + limit - 2, count))]
        chunk = [(90, 1.0, 0), *words, (91, 1.0, 0)]
        chunks.append(chunk + [(91, 1.0, 0)] * (limit - len(chunk)))
    rows = tokens.kinds(chunks, WORDS.get, start=90, end=91, **options)
    return Encoded("CLIP-L", rows, (), limit, options.get("reads_all", True))


def test_each_position_has_its_kind():
    row = clip(2).chunks[0]
    assert [token.kind for token in row] == [START, TEXT, TEXT, END] + [PADDING] * 73
    assert clip(2).padding_begins == 4 and clip(75).padding_begins is None
    assert [token.kind for token in clip(0).tokens[:3]] == [START, END, PADDING]


def test_t5_has_no_start_and_its_own_padding():
    rows = tokens.kinds([[(7, 1.2, 1), (1, 1.0, 0), (0, 1.0, 0)]], WORDS.get, start=None, end=1)
    encoded = Encoded("T5", rows, (), 512)
    assert [token.kind for token in encoded.tokens] == [TEXT, END, PADDING]
    assert "weight 1.2" in tokens.report([encoded])


def test_a_later_chunk_is_lost_only_where_the_model_does_not_read_it():
    assert tokens.warning([clip(100)]) == "" and clip(100).text == 100
    told = tokens.warning([clip(100, reads_all=False)])
    assert "CLIP-L: the last 25 of 100 tokens" in told and "pooled vector does not read" in told


def test_text_beyond_the_trained_length_is_told():
    ids = [(7, 1.0, k + 1) for k in range(600)] + [(1, 1.0, 0)]
    rows = tokens.kinds([ids], WORDS.get, start=None, end=1, limit=512)
    encoded = Encoded("T5", rows, (), 512)
    assert [token.kind for token in encoded.tokens[509:513]] == [TEXT, TEXT, BEYOND, BEYOND]
    assert "the last 89 of 600 tokens are beyond the 512 positions" in tokens.warning([encoded])
    fits = tokens.kinds([[*ids[:511], (1, 1.0, 0)]], WORDS.get, start=None, end=1, limit=512)
    assert tokens.warning([Encoded("T5", fits, (), 512)]) == ""


def test_words_that_were_cut_are_named_and_drawn():
    whole = clip(3)
    cut = Encoded("CLIP-L", whole.chunks, (Token(8, "circle</w>", 1.0, CUT),), 77)
    assert "the last 1 of 4 tokens were cut off: 'circle'" in tokens.warning([cut])
    assert "WARNING" in tokens.report([cut]) and "Nothing is cut off" in tokens.report([whole])
    image, plain = tokens.image([cut], "red"), tokens.image([whole], "red")
    assert image.shape[2:] == (960, 3) and 0 <= image.min() and image.max() <= 1
    red = torch.tensor(tokens.GROUNDS[CUT]) / 255
    assert ((image - red).abs().amax(-1) < 1e-3).sum() > 1.5 * ((plain - red).abs().amax(-1) < 1e-3).sum()
