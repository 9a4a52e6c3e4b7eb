"""Tokenizers of Marian, with SentencePiece models that the tests train."""

import dataclasses
import functools
import io
import json
import sys

import pytest

from train.data import saved_tokenizer
from train.data.sentence_pieces import SentencePieces
from train.data.tokenizer import SpecialTokens, Tokenizer

ENGLISH = ["the cat sat on the mat", "the dog ran to the cat", "a cat and a dog sat", "they ran on and on"] * 5
GERMAN = ["die katze sass auf der matte", "der hund lief zur katze", "sie liefen und liefen weiter"] * 5
SPECIAL = SpecialTokens(end=(0,), start=2, pad=2)


@functools.cache
def model_of(language: str) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece", reason="an extra")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter({"en": ENGLISH, "de": GERMAN}[language]),
        model_writer=written,
        vocab_size=23,
        minloglevel=2,
    )
    return written.getvalue()


@functools.cache
def vocabulary_of() -> dict[str, int]:
    import sentencepiece

    names = ["</s>", "<unk>", "<pad>", ">>fra<<"]
    for language in ("en", "de"):
        model = sentencepiece.SentencePieceProcessor(model_proto=model_of(language))
        names += [model.id_to_piece(number) for number in range(3, model.get_piece_size())]
    return {piece: number for number, piece in enumerate(dict.fromkeys(names))}


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieces(vocabulary_of(), model_of("en"), model_of("de"), SPECIAL) if model_of("en") else None


def write(folder, **config):
    (folder / "source.spm").write_bytes(model_of("en"))
    (folder / "target.spm").write_bytes(model_of("de"))
    (folder / "vocab.json").write_text(json.dumps(vocabulary_of()), "utf-8")
    fields = {"eos_token_id": 0, "decoder_start_token_id": 2, "pad_token_id": 2} | config
    (folder / "config.json").write_text(json.dumps(fields), "utf-8")
    return folder


def test_sources_and_targets_have_their_own_models(tokenizer):
    import sentencepiece

    vocabulary = vocabulary_of()
    for language, text, found in (
        ("en", ENGLISH[1], tokenizer.sources([ENGLISH[1]])[0][:-1]),
        ("de", GERMAN[0], tokenizer.targets([GERMAN[0]])[0][1:-1]),
    ):
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model_of(language)).encode(text, out_type=str)
        assert found == [vocabulary[piece] for piece in pieces]
    assert tokenizer.sources([""]) == [[0]]
    assert tokenizer.targets([""]) == [[2, 0]]
    assert tokenizer.pad_id != tokenizer.end_id


def test_decoding_inverts_targets_and_ends_at_the_end(tokenizer):
    for text in GERMAN[:3]:
        start, *ids = tokenizer.targets([text])[0]
        assert start == 2
        assert tokenizer.decode([*ids, 5, 6]) == text
    assert tokenizer.decode([2, 1, 0]) == ""
    # The table of a model may be longer than the vocabulary.
    start, *ids = tokenizer.targets([GERMAN[0]])[0]
    assert tokenizer.decode([999, *ids[:3], 999, *ids[3:]]) == GERMAN[0]
    with pytest.raises(ValueError, match=r"id \(999\) must be 0 to"):
        tokenizer.tokens([999])


def test_unknown_pieces_and_the_language_of_the_target(tokenizer):
    assert tokenizer.unknown_id == 1
    assert 1 in tokenizer.encode("the Ж")
    assert tokenizer.encode(">>fra<< the cat") == [3, *tokenizer.encode("the cat")]
    # A language that the vocabulary lacks is an unknown token; an open bracket is a text.
    assert tokenizer.encode(">>ita<< the cat") == [1, *tokenizer.encode("the cat")]
    assert tokenizer.encode(">> the cat")[0] != 3
    assert tokenizer.tokens([0, 3]) == ["</s>", ">>fra<<"]
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.sources(["\ud800"])


def test_files_and_json_give_the_same_tokenizer(tokenizer, tmp_path):
    write(tmp_path)
    for again in (saved_tokenizer.from_folder(tmp_path), saved_tokenizer.from_json(tokenizer.to_json())):
        assert isinstance(again, SentencePieces)
        assert again.to_json() == tokenizer.to_json()
        assert (again.vocab_size, again.special) == (len(vocabulary_of()), dataclasses.replace(SPECIAL, end=(0,)))
    with pytest.raises(ValueError, match="must be a WordLevel or a BPE"):
        Tokenizer.from_json(tokenizer.to_json())


def test_damaged_or_missing_files_are_named(tokenizer, tmp_path):
    write(tmp_path)
    (tmp_path / "source.spm").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"source\.spm is damaged, or no SentencePiece model"):
        SentencePieces.from_folder(tmp_path)
    (tmp_path / "source.spm").unlink()
    with pytest.raises(FileNotFoundError, match=r"source\.spm is missing"):
        SentencePieces.from_folder(tmp_path)
    write(tmp_path)
    vocabulary = vocabulary_of()
    for change, message in (
        ({"</s>": 1}, r"vocab\.json must have each id once"),
        ({"</s>": "0"}, r"vocab\.json must map pieces to ids"),
    ):
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | change), "utf-8")
        with pytest.raises(ValueError, match=message):
            SentencePieces.from_folder(tmp_path)
    without = {piece: number for piece, number in vocabulary.items() if piece != "<unk>"}
    (tmp_path / "vocab.json").write_text(json.dumps(without), "utf-8")
    with pytest.raises(ValueError, match=r"vocab\.json must have the token <unk>"):
        SentencePieces.from_folder(tmp_path)
    (tmp_path / "target_vocab.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match=r"target_vocab\.json: a vocabulary of its own for targets"):
        SentencePieces.from_folder(tmp_path)


def test_json_of_another_kind_is_refused(tokenizer):
    parsed = json.loads(tokenizer.to_json())
    with pytest.raises(ValueError, match="must have the fields source, special, target, vocabulary"):
        SentencePieces.from_json(json.dumps(parsed | {"more": 1}))
    with pytest.raises(ValueError, match="its special tokens must be a JSON object"):
        SentencePieces.from_json(json.dumps(parsed | {"special": []}))


def test_without_sentencepiece_the_sentence_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"source\.spm needs sentencepiece: pip install"):
        SentencePieces(vocabulary_of(), model_of("en"), model_of("de"), SPECIAL)


@pytest.mark.slow
def test_ids_and_texts_are_those_of_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: make test-hf runs this")
    write(tmp_path, model_type="marian")
    peer = transformers.MarianTokenizer.from_pretrained(tmp_path)
    texts = [*ENGLISH[:3], ">>fra<< the cat sat", "the Ж ran", ""]
    assert tokenizer.sources(texts) == peer(texts)["input_ids"]
    targets = peer(text_target=GERMAN[:3])["input_ids"]
    assert [ids[1:] for ids in tokenizer.targets(GERMAN[:3])] == targets
    for ids in (*targets, [5, 9, 1, 30, 2, 11], [3, 4, 0, 7]):
        upto = ids[: ids.index(0)] if 0 in ids else ids
        assert tokenizer.decode(ids) == peer.decode(upto, skip_special_tokens=True)
