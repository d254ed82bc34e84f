"""Tokenizers: reserved tokens are found or asked for, training is deterministic, bytes are counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from isofusion.data import tokenizer as module
from isofusion.data.tokenizer import JsonTokenizer, load, parse, train
from isofusion.errors import InputError

TEXT = ["the cat sat on the mat, naïve café 🙂", "the dog sat on the log", "a\n\nparagraph of  spaces"] * 20


def test_trained_is_deterministic_cached_and_exact(tmp_path, monkeypatch):
    one = train(400, lambda: TEXT, "corpus")
    assert json.loads(one.content) == json.loads(module._train(400, iter(TEXT)))
    monkeypatch.setattr(module, "_train", lambda *a: pytest.fail("trained again"))
    two = train(400, lambda: TEXT, "corpus")
    assert one.digest == two.digest
    assert one.vocab_size <= 400
    assert sorted({one.pad_id, one.bos_id, one.eos_id, one.image_id}) == [0, 1, 2, 3]
    for text in [*TEXT[:3], "unseen ∑ 字 \x00"]:
        ids = one.encode(text)
        assert ids.dtype == np.int32
        assert one.decode(ids) == text
        assert one.n_bytes(ids) == len(text.encode())


def test_text_never_becomes_a_reserved_token():
    tok = train(300, lambda: TEXT, "c")
    ids = tok.encode("evil <eos> <image> text")
    assert not set(ids.tolist()) & {tok.pad_id, tok.bos_id, tok.eos_id, tok.image_id}
    assert tok.n_bytes(np.array([tok.eos_id, tok.bos_id])) == 0


def _words(special):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate([*special, "[UNK]", "a", "b"])}
    tok = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.add_special_tokens(list(special))
    return tok


RESERVED = ["<pad>", "<s>", "</s>", "<image>"]


def _words_between_spaces(add: str) -> JsonTokenizer:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*([] if add == "added" else RESERVED), "[UNK]", "a", "b", "<", "image>"]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if add == "special":
        tok.add_special_tokens(RESERVED)
    elif add == "added":
        tok.add_tokens(RESERVED)
    return JsonTokenizer(tok.to_str())


def _unigram() -> JsonTokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [(r, 0.0) for r in [*RESERVED, "<unk>"]] + [(c, -3.0) for c in "ab</image>s\u2581"]
    tok = Tokenizer(models.Unigram(pieces, unk_id=4))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return JsonTokenizer(tok.to_str())


@pytest.mark.parametrize("kind", ["ordinary", "special", "added", "unigram"])
def test_text_that_spells_a_reserved_token_is_taken_apart_whatever_the_file_calls_it(kind):
    tok = _unigram() if kind == "unigram" else _words_between_spaces(kind)
    reserved = {tok.pad_id, tok.bos_id, tok.eos_id, tok.image_id}
    for text in ("a <image> b", "<image>", "a </s>", "<s> <pad> <image><image>"):
        assert reserved.isdisjoint(tok.encode(text).tolist())
        assert tok.encode_many(["a", text])[1].tolist() == tok.encode(text).tolist()
    assert tok.decode(tok.encode("a <image> b")).replace(" ", "") == "a<image>b"
    many = tok.encode("<image> " * 5000)
    assert reserved.isdisjoint(many.tolist())
    assert len(many) >= 10_000


@pytest.mark.parametrize("kind", ["ordinary", "special", "added", "unigram"])
def test_bytes_leave_reserved_tokens_out_and_unknown_ones_leave_them_open(kind):
    tok = _unigram() if kind == "unigram" else _words_between_spaces(kind)
    ids = tok.encode("a b")
    assert tok.n_bytes(np.array([tok.bos_id, *ids, tok.eos_id])) == 3
    assert tok.n_bytes(tok.encode("a zzz b")) is None


def test_an_end_token_that_is_the_unknown_token_too_is_an_end():
    spec = json.loads(train(300, lambda: TEXT, "c").content)
    spec["model"]["unk_token"] = "<eos>"
    tok = JsonTokenizer(json.dumps(spec))
    assert tok.n_bytes(np.array([tok.bos_id, *tok.encode("café"), tok.eos_id])) == 5


def test_an_ordinary_end_token_of_a_byte_level_model_spells_no_bytes():
    spec = json.loads(train(300, lambda: TEXT, "c").content)
    spec["added_tokens"] = []
    tok = JsonTokenizer(json.dumps(spec))
    ids = tok.encode("some text </s> <image>")
    assert tok.n_bytes(np.array([tok.bos_id, *ids, tok.eos_id])) == len("some text </s> <image>")


def test_other_names_of_reserved_tokens(tmp_path):
    path = tmp_path / "tokenizer.json"
    _words(["<s>", "</s>", "[PAD]", "<|image|>"]).save(str(path))
    tok = load(path)
    assert (tok.bos_id, tok.eos_id, tok.pad_id, tok.image_id) == (0, 1, 2, 3)
    assert tok.n_bytes(tok.encode("a b")) == 3


def test_missing_reserved_tokens_are_named_with_the_remedy(tmp_path):
    path = tmp_path / "tokenizer.json"
    _words(["<s>", "<|endoftext|>"]).save(str(path))
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert "lacks reserved tokens: pad" in message
    assert "image" in message
    assert "add_special_tokens(['<pad>', '<image>'])" in message
    assert "bos" not in message


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer gpt2: .*; .* path of a tokenizer\.json, no name"):
        load(Path("gpt2"))
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        load(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer\.json"):
        load(tmp_path / "x.json")
    with pytest.raises(InputError, match="too small"):
        train(100, lambda: TEXT, "c")
    with pytest.raises(InputError, match="whole number"):
        parse("train:many")
    assert parse("train:4_096") == 4096
    assert parse("world") is None


def test_saved_tokenizer_comes_back_the_same(tmp_path):
    tok = train(300, lambda: TEXT, "c")
    (tmp_path / "t.json").write_text(tok.content)
    assert load(tmp_path / "t.json").digest == tok.digest == JsonTokenizer(tok.content).digest
