"""Defaults of decoding: what the fields of transformers mean here."""

import json

import pytest

from seqattn.decoding import AverageLength, Stopping
from train.hub.generation_config import decoding_of
from train.inference.decoding import Decoding


def written(folder, config=None, generation=None):
    (folder / "config.json").write_text(json.dumps(config or {}), "utf-8")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    return folder


def test_nothing_said_is_greedy_search(tmp_path, caplog):
    # Where beam search is asked for without a rule, that of transformers holds.
    assert decoding_of(written(tmp_path)) == Decoding(stopping=Stopping.LIKELY)
    assert not caplog.records


def test_each_field_has_its_meaning(tmp_path, caplog):
    fields = {"num_beams": 4, "length_penalty": 2, "early_stopping": True, "max_length": 20, "min_length": 6}
    fields |= {"no_repeat_ngram_size": 3, "repetition_penalty": 1.5, "bad_words_ids": [[7], [3]]}
    fields |= {"suppress_tokens": [9], "eos_token_id": 2, "transformers_version": "5", "temperature": 0.5}
    # Lengths of transformers count the start token. Without sampling, a temperature has no effect.
    expected = Decoding(4, AverageLength(2.0), Stopping.FIRST, 19, 6, 1.5, 3, (3, 7, 9))
    assert decoding_of(written(tmp_path, {"num_beams": 9}, fields)) == expected
    # The fields of older models, in a config with fields of other kinds.
    old = {name: value for name, value in fields.items() if name != "eos_token_id"} | {"d_model": 8}
    (tmp_path / "generation_config.json").unlink()
    assert decoding_of(written(tmp_path, old)) == expected
    assert not caplog.records


def test_new_tokens_are_counted_as_such(tmp_path):
    fields = {"max_new_tokens": 9, "min_new_tokens": 4, "max_length": 77, "early_stopping": "never"}
    found = decoding_of(written(tmp_path, {}, fields))
    assert (found.max_length, found.min_length, found.stopping) == (9, 5, Stopping.EXACT)


def test_sampling_of_a_language_model(tmp_path):
    fields = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "max_length": 4096}
    found = decoding_of(written(tmp_path, {}, fields), decoder_only=True)
    assert (found.temperature, found.top_p, found.top_k, found.max_length) == (0.6, 0.9, 50, None)


def test_sampling_is_from_the_50_most_probable_tokens_unless_the_file_says_otherwise(tmp_path):
    # Llama 3 says no more than this. The default of transformers is 50; 0 is all tokens.
    fields = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    assert decoding_of(written(tmp_path, {}, fields), decoder_only=True).top_k == 50
    assert decoding_of(written(tmp_path, {}, fields | {"top_k": 0}), decoder_only=True).top_k is None


def test_a_language_model_is_told_what_only_sequences_to_sequences_have(tmp_path, caplog):
    # Qwen 2.5 has a penalty.
    fields = {"repetition_penalty": 1.05, "num_beams": 2, "bad_words_ids": [[3]], "max_length": 9, "top_k": 20}
    found = decoding_of(written(tmp_path, {}, fields), decoder_only=True)
    assert found == Decoding(stopping=Stopping.LIKELY)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "bad_words_ids ([[3]]) has no effect here",
        "num_beams (2) has no effect here",
        "repetition_penalty (1.05) has no effect here",
    ]


def test_an_encoder_decoder_does_not_sample_by_itself(tmp_path, caplog):
    decoding_of(written(tmp_path, {}, {"do_sample": True, "top_k": 3}))
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "do_sample (True) has no effect here"
    ]


@pytest.mark.parametrize("content", [b"[]", b"3", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_refused_by_its_name(tmp_path, content):
    written(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"generation_config\.json( must hold a JSON object|: )"):
        decoding_of(tmp_path)


def test_fields_without_effect_are_told(tmp_path, caplog):
    fields = {"num_beam_groups": 2, "diversity_penalty": 0.0, "typical_p": 1.0, "bad_words_ids": [[1, 2], [3]]}
    assert decoding_of(written(tmp_path, {}, fields)).banned == (3,)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "bad_words_ids ([[1, 2]]) has no effect here",
        "num_beam_groups (2) has no effect here",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"early_stopping": "sometimes"}, 'early_stopping must be true, false or "never", got'),
        ({"early_stopping": [1]}, "early_stopping must be"),
        ({"length_penalty": "long"}, "length_penalty"),
        ({"suppress_tokens": 3}, "suppress_tokens must be a list of ids, got 3"),
        ({"suppress_tokens": [-1]}, "must be ids, got"),
        ({"bad_words_ids": [3]}, "bad_words_ids must be a list of lists of ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be a list of lists of ids"),
        ({"max_length": 1}, "max_length"),
        ({"max_length": 10**30}, "max_length"),
        ({"num_beams": 10**30}, "num_beams"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"do_sample": "false"}, "do_sample must be true or false"),
        ({"do_sample": True, "temperature": -1}, "temperature"),
        ({"do_sample": True, "top_p": 3}, "top_p"),
    ],
)
def test_values_out_of_range_are_refused_with_the_file(tmp_path, fields, message):
    with pytest.raises(ValueError, match=rf"generation_config\.json: .*{message}"):
        decoding_of(written(tmp_path, {}, fields))
