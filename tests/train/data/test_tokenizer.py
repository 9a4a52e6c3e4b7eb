import json
import pickle
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from train.data.tokenizer import ByteLevelBPE, Characters, Tokenizer

TEXTS = ["low lower lowest", "naïve 你好 [END]", "two  spaces\tand\r\nlines\n\n\0", "5 янв. 1994 г. 你 你 你"]
CONFIGS = (Characters(), ByteLevelBPE(vocab_size=300))
SPECIAL = ["[PAD]", "[START]", "[END]", "[UNK]"]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(params=CONFIGS, ids=["characters", "bpe"])
def tokenizer(request):
    return Tokenizer.train(request.param, TEXTS)


@pytest.mark.parametrize("text", [*TEXTS, "", " ", "\0\r\n\t"])
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=UNICODE)
def test_bpe_knows_every_text(text):
    tokenizer = Tokenizer.train(CONFIGS[1], TEXTS)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert not {0, 1, 2, 3} & set(ids)


@given(text=UNICODE)
def test_characters_that_were_seen_come_back_one_token_each(text):
    tokenizer = Tokenizer.train(Characters(), [text, "x"])
    normal = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text)) == normal
    assert len(tokenizer.encode(text)) == len(normal)


def test_composed_and_decomposed_text_are_the_same(tokenizer):
    assert tokenizer.encode("nai\u0308ve") == tokenizer.encode("na\u00efve")
    decomposed = Tokenizer.train(Characters(), ["nai\u0308ve"])
    assert decomposed.decode(decomposed.encode("nai\u0308ve")) == "na\u00efve"


def test_the_empty_text_has_no_ids(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.tokens([]) == []


def test_unseen_characters_are_unknown():
    tokenizer = Tokenizer.train(Characters(), ["abc"])
    assert tokenizer.encode("a?b\U0001f600") == [4, 3, 5, 3]
    assert tokenizer.decode([4, 3, 5]) == "a[UNK]b"


def test_special_tokens_come_first(tokenizer):
    ids = [tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.unknown_id]
    assert ids == [0, 1, 2, 3]
    assert tokenizer.tokens(ids) == SPECIAL


def test_vocab_size_counts_all_tokens(tokenizer):
    assert len(tokenizer.tokens(range(tokenizer.vocab_size))) == tokenizer.vocab_size
    with pytest.raises(ValueError, match=rf"id \({tokenizer.vocab_size}\) must be 0 to {tokenizer.vocab_size - 1}"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(ValueError, match=r"id \(-1\) must be 0 to"):
        tokenizer.tokens([-1])


def test_bpe_has_the_size_asked_for_or_as_many_as_the_texts_give():
    assert Tokenizer.train(ByteLevelBPE(vocab_size=270), TEXTS).vocab_size == 270
    assert Tokenizer.train(ByteLevelBPE(vocab_size=270), ["ab"]).vocab_size == 261
    assert Tokenizer.train(ByteLevelBPE(vocab_size=260), TEXTS).vocab_size == 260
    with pytest.raises(ValueError, match=r"vocab_size \(259\) must be an integer of at least 260"):
        Tokenizer.train(ByteLevelBPE(vocab_size=259), TEXTS)


def test_characters_need_a_text():
    with pytest.raises(ValueError, match="not empty"):
        Tokenizer.train(Characters(), ["", ""])


def test_encode_batch_is_encode_of_each(tokenizer, monkeypatch):
    texts = ["low", "", "lowest 好"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(iter(texts)) == tokenizer.encode_batch(texts)
    monkeypatch.setattr("train.data.tokenizer._TOGETHER", 2)
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_decode_stops_at_the_first_end_and_drops_padding_and_start(tokenizer):
    ids = tokenizer.encode("low")
    assert tokenizer.decode([0, 1, *ids, 0, 2, *ids, 2, 999]) == "low"
    assert tokenizer.decode(np.array([1, *ids, 2, 0], np.int32)) == "low"


def test_labels_can_be_printed(tokenizer):
    for text in TEXTS:
        labels = tokenizer.tokens(tokenizer.encode(text))
        assert all(label and label.isprintable() and " " not in label for label in labels)
    assert "".join(tokenizer.tokens(tokenizer.encode("lo w你"))) == "lo␣w你"


def test_labels_of_invisible_characters_and_of_parts_of_characters():
    characters, bpe = (Tokenizer.train(config, ["low\n\u202f"]) for config in (Characters(), ByteLevelBPE(260)))
    assert characters.tokens(characters.encode("w\n\u202f")) == ["w", r"\n", r"\u202f"]
    assert bpe.tokens(bpe.encode(" é")) == ["␣", "�", "�"]


@pytest.mark.parametrize("special", SPECIAL)
def test_c17_special_tokens_in_a_text_are_text(tokenizer, special):
    learned = Tokenizer.train(ByteLevelBPE(vocab_size=400), [f"{special} {special}{special}"] * 50)
    for any_tokenizer in (tokenizer, learned, pickle.loads(pickle.dumps(tokenizer))):
        ids = any_tokenizer.encode(f"low {special}low{special}")
        assert not {0, 1, 2} & set(ids)
    assert learned.decode(learned.encode(special)) == special
    assert learned.tokens(range(4)) == SPECIAL


def test_c18_training_again_gives_the_same_ids():
    for config in CONFIGS:
        first, second = (Tokenizer.train(config, TEXTS) for _ in range(2))
        assert first.to_json() == second.to_json()


def test_characters_do_not_depend_on_the_order_of_texts():
    assert Tokenizer.train(Characters(), TEXTS).to_json() == Tokenizer.train(Characters(), TEXTS[::-1]).to_json()


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    for copy in (Tokenizer.load(path), Tokenizer.load(str(path)), Tokenizer.from_json(tokenizer.to_json())):
        assert copy.to_json() == tokenizer.to_json()
        assert copy.vocab_size == tokenizer.vocab_size
        assert copy.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
        assert [copy.decode(ids) for ids in copy.encode_batch(TEXTS)] == TEXTS


def test_the_file_is_one_of_the_tokenizers_package(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [plain.encode(text).ids for text in TEXTS] == tokenizer.encode_batch(TEXTS)


def test_c19_padding_and_truncation_of_a_file_are_cleared(tokenizer):
    plain = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    plain.enable_padding(length=64)
    plain.enable_truncation(2)
    assert len(plain.encode(TEXTS[0]).ids) == 64
    copy = Tokenizer.from_json(plain.to_str())
    assert copy.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert copy.to_json() == tokenizer.to_json()


def broken(tokenizer, tmp_path, change):
    """The path of a tokenizer file after a change to its parsed content."""
    content = json.loads(tokenizer.to_json())
    change(content)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"low": 5}, "id 5 must belong to one token, not to .* and 'low'"),
        ({"low": 999}, r"id 999 of 'low' must be 0 to \d+"),
        ({"low": -1}, r"id -1 of 'low' must be 0 to \d+"),
        ({"low": 5.0}, "must map tokens to whole numbers"),
        ({"low": True}, "must map tokens to whole numbers"),
        ({"[END]": 3, "[UNK]": 2}, r"\[END\] must have id 2, not 3"),
    ],
)
def test_c15_ids_that_are_not_sound(tokenizer, tmp_path, change, rule):
    path = broken(tokenizer, tmp_path, lambda content: content["model"]["vocab"].update(change))
    with pytest.raises(ValueError, match=rf"broken\.json: .*{rule}"):
        Tokenizer.load(path)


def test_c15_a_hole_in_the_ids(tokenizer, tmp_path):
    path = broken(tokenizer, tmp_path, lambda content: content["model"]["vocab"].pop("w"))
    with pytest.raises(ValueError, match=r"broken\.json: id (\d+) of .* must be 0 to"):
        Tokenizer.load(path)


def test_c15_a_special_token_is_missing(tokenizer, tmp_path):
    def rename(content):
        vocab = content["model"]["vocab"]
        vocab["<pad>"] = vocab.pop("[PAD]")

    with pytest.raises(ValueError, match=r"broken\.json: \[PAD\] must have id 0, not None"):
        Tokenizer.load(broken(tokenizer, tmp_path, rename))


def test_c15_added_tokens_clash(tokenizer, tmp_path):
    plain = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    plain.add_special_tokens(["low"])
    path = broken(tokenizer, tmp_path, lambda content: content.update(json.loads(plain.to_str())))
    with pytest.raises(ValueError, match=r"broken\.json: it must not have added tokens, but has 1"):
        Tokenizer.load(path)


@pytest.mark.parametrize("end", [0, 1, 100, -1])
def test_c15_a_truncated_file(tokenizer, tmp_path, end):
    path = tmp_path / "short.json"
    path.write_text(tokenizer.to_json()[:end])
    with pytest.raises(ValueError, match=r"short\.json: "):
        Tokenizer.load(path)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", '{"model": []}', '{"model": {"type": "Unigram"}}'])
def test_c15_other_json(text):
    with pytest.raises(ValueError, match="must be a WordLevel or a BPE"):
        Tokenizer.from_json(text)


def test_c15_a_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "bytes.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bytes\.json: "):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("merges", "rule"),
    [
        (None, "must be a list"),
        ([["l", "o", "w"]], "must be a pair"),
        (["l o"], "must be a pair"),
        ([["l", 3]], "must be a pair"),
        ([["q", "q"]], "must join two tokens"),
        ([["", "l"]], "must join two tokens"),
    ],
)
def test_c15_merges_that_are_not_sound(tmp_path, merges, rule):
    bpe = Tokenizer.train(CONFIGS[1], TEXTS)
    path = broken(bpe, tmp_path, lambda content: content["model"].update(merges=merges))
    with pytest.raises(ValueError, match=rf"broken\.json: .*{rule}"):
        Tokenizer.load(path)


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder"])
def test_c22_parts_of_another_kind_are_refused(tokenizer, tmp_path, part):
    for other in (None, {"type": "Lowercase"}):
        path = broken(tokenizer, tmp_path, lambda content, other=other: content.update({part: other}))
        with pytest.raises(ValueError, match=rf"broken\.json: its {part} \((None|Lowercase)\) must be"):
            Tokenizer.load(path)


def test_c22_a_pattern_in_a_file_is_never_compiled(tmp_path):
    characters = Tokenizer.train(Characters(), ["ab"])
    pattern = {"Regex": "(a+)+$"}
    path = broken(characters, tmp_path, lambda content: content["pre_tokenizer"].update(pattern=pattern))
    assert Tokenizer.load(path).to_json() == characters.to_json()


@pytest.mark.parametrize("text", ["ab\ud800", "\udfff", "ok \ud83d \ude00"])
def test_c4_a_lone_surrogate_is_named(tokenizer, text):
    for use in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(ValueError, match=r"character \d \(U\+D[89A-F]\w\w\) is a lone surrogate"):
            use(text)
    for config in CONFIGS:
        with pytest.raises(ValueError, match="lone surrogate"):
            Tokenizer.train(config, ["fine", text])


def test_c4_nul_is_a_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("s\0")) == "s\0"
    assert tokenizer.tokens(tokenizer.encode("\0")) == [r"\x00"]
