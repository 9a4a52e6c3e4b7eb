"""Tokenizers of transformers: which ids a model reads and writes, and what is refused."""

import dataclasses
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.huggingface_folders import tokenizer_of
from train.data.pretrained_tokenizer import PretrainedTokenizer, SpecialTokens
from train.data.tokenizer import Characters, Tokenizer

BART = SpecialTokens(end=(2,), start=2, pad=1)
TEXTS = ["two one", "", "five five five five"]


@pytest.fixture
def bart():
    return PretrainedTokenizer(tokenizer_of("bart").to_str(), BART)


def folder_with(path, config, generation=None, family="bart"):
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer_of(family).save(str(path / "tokenizer.json"))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    return path


def test_sources_have_what_the_file_puts_around_them_and_targets_what_a_decoder_reads(bart):
    assert bart.sources(TEXTS) == bart.inputs(TEXTS) == [[0, 5, 4, 2], [0, 2], [0, 8, 8, 8, 8, 2]]
    assert bart.targets(TEXTS[:2]) == [[2, 5, 4, 2], [2, 2]]
    assert bart.encode("two one") == [5, 4]
    # BART's targets start with the start token of its sources.
    forced = PretrainedTokenizer(tokenizer_of("bart").to_str(), dataclasses.replace(BART, first=(0,)))
    assert forced.targets(TEXTS[:2]) == [[2, 0, 5, 4, 2], [2, 0, 2]]
    assert forced.sources(TEXTS) == bart.sources(TEXTS)


def test_prompts_have_a_start_token_where_the_file_has_one_and_are_never_empty():
    llama = PretrainedTokenizer(tokenizer_of("llama").to_str(), SpecialTokens((2,), 1, 0))
    gpt2 = PretrainedTokenizer(tokenizer_of("gpt2").to_str(), SpecialTokens((2,), 1, 2))
    assert llama.prompts(["one", ""]) == [[1, 3], [1]]
    assert gpt2.prompts(["one", ""]) == [[3], [1]]


def test_decoding_ends_at_any_end_token_and_leaves_special_tokens_out(bart):
    assert bart.decode([2, 0, 5, 4, 2, 8]) == ""
    assert bart.decode([0, 5, 4, 2, 8]) == "two one"
    several = PretrainedTokenizer(tokenizer_of("llama").to_str(), SpecialTokens((2, 5), 1, 0))
    assert several.decode([3, 4, 5, 6]) == "one two"


def test_ids_that_only_the_model_has_decode_to_nothing_as_in_transformers(bart):
    # The tables of many models are longer than the vocabulary.
    assert bart.decode([4, 9, 99, 5, 2]) == "one two"


def test_what_goes_on_keeps_the_space_before_it():
    llama = PretrainedTokenizer(tokenizer_of("llama").to_str(), SpecialTokens((2, 7), 1, 0))
    for text in ("one two", "one", ""):
        (before,) = llama.prompts([text])
        assert text + llama.continuation(before, [5, 99, 4, 2, 3]) == f"{text} three two".strip()
    # The start token of a prompt may be the end token.
    assert llama.continuation([2], [5]) == "three"
    assert Tokenizer.train(Characters(), ["ab"]).continuation([1, 4], [5, 2, 4]) == "b"


def test_labels_of_tokens_can_be_printed(bart):
    assert bart.tokens([0, 5, 2]) == ["<s>", "␣two", "</s>"]
    bytes_of = tokenizers.Tokenizer(models.BPE({"Ġ": 0, "a": 1, "Ã": 2, "</s>": 3}, []))
    bytes_of.pre_tokenizer, bytes_of.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    assert PretrainedTokenizer(bytes_of.to_str(), SpecialTokens((3,), 3, 3)).tokens([0, 1, 2]) == ["␣", "a", "\ufffd"]


def test_a_search_can_tell_padding_from_the_end():
    for end in (0, 2):
        tokenizer = PretrainedTokenizer(tokenizer_of("gpt2").to_str(), SpecialTokens((end,), 1, end))
        assert tokenizer.pad_id != tokenizer.end_id == end
        assert tokenizer.special.pad == tokenizer.pad_id


def test_padding_and_truncation_of_the_file_are_left_out(bart):
    assert len(tokenizer_of("bart").encode(TEXTS[2]).ids) == 20
    assert len(bart.sources(TEXTS)[2]) == 6


def test_json_gives_the_same_tokenizer(bart):
    again = PretrainedTokenizer.from_json(bart.to_json())
    assert again.to_json() == bart.to_json()
    assert (again.special, again.vocab_size) == (bart.special, 9)
    assert again.sources(TEXTS) == bart.sources(TEXTS)
    with pytest.raises(ValueError, match="must be a WordLevel or a BPE"):
        Tokenizer.from_json(bart.to_json())


@pytest.mark.parametrize(
    ("special", "message"),
    [
        ({"start": 2, "pad": 1, "end": [2]}, "must be start, pad and the lists end and first"),
        ({"start": 2, "pad": 1, "end": 2, "first": []}, "must be start, pad and the lists end and first"),
        ({"start": True, "pad": 1, "end": [2], "first": []}, "must be ids, got .*True"),
        ({"start": 2, "pad": 1, "end": [], "first": []}, "needs at least one id that ends a text"),
        ({"start": 2, "pad": 1, "end": [2, 99], "first": []}, "it has no token 99, the end token of the model"),
        ({"start": 2, "pad": 1, "end": [2], "first": [98]}, "it has no token 98, the first token of the model"),
    ],
)
def test_json_of_another_kind_is_refused(bart, special, message):
    parsed = json.loads(bart.to_json())
    with pytest.raises(ValueError, match=message):
        PretrainedTokenizer.from_json(json.dumps(parsed | {"special": special}))
    with pytest.raises(ValueError, match="must have the fields special and tokenizer"):
        PretrainedTokenizer.from_json(json.dumps(parsed | {"more": 1}))


def test_generation_config_comes_before_config(tmp_path):
    config = {"eos_token_id": 2, "decoder_start_token_id": 0, "pad_token_id": 1}
    found = PretrainedTokenizer.from_folder(folder_with(tmp_path, config)).special
    assert found == SpecialTokens((2,), 0, 1)
    later = {"decoder_start_token_id": 2, "eos_token_id": [2, 3], "forced_bos_token_id": 0, "pad_token_id": None}
    found = PretrainedTokenizer.from_folder(folder_with(tmp_path, config, later)).special
    assert found == SpecialTokens((2, 3), 2, 1, (0,))


def test_first_tokens_are_those_of_the_file_that_transformers_reads(tmp_path):
    config = {"eos_token_id": 2, "forced_bos_token_id": 0}
    folder = folder_with(tmp_path, config)
    assert PretrainedTokenizer.from_folder(folder).special.first == (0,)
    for generation in ({"eos_token_id": [2, 2]}, {"forced_bos_token_id": None}):
        special = PretrainedTokenizer.from_folder(folder_with(tmp_path, config, generation)).special
        assert (special.first, special.end) == ((), (2,))


@pytest.mark.parametrize("content", [b"[]", b"3", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_generation_config_is_refused_by_its_name(tmp_path, content):
    folder = folder_with(tmp_path, {"eos_token_id": 2})
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"generation_config\.json( must hold a JSON object|: )"):
        PretrainedTokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pad_token_id": 1}, r"config\.json: eos_token_id \(None\) must be the id of the end token"),
        (
            {"eos_token_id": 2, "forced_bos_token_id": "<s>"},
            r"config\.json: .*must be ids, got 2, 2, <s>",
        ),
        (
            {"eos_token_id": 2, "decoder_start_token_id": 77},
            r"tokenizer\.json: it has no token 77, the start token",
        ),
    ],
)
def test_a_folder_without_the_special_tokens_of_decoding_is_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        PretrainedTokenizer.from_folder(folder_with(tmp_path, config))


def test_an_encoder_needs_no_start_and_end(tmp_path):
    tokenizer = PretrainedTokenizer.from_folder(
        folder_with(tmp_path, {"pad_token_id": 0}, family="bert"), decodes=False
    )
    assert tokenizer.inputs(["one two"]) == [[2, 5, 6, 3]]


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing$"):
        PretrainedTokenizer.from_folder(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing: convert spiece\.model where .*save_pre"):
        PretrainedTokenizer.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}', "utf-8")
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        PretrainedTokenizer.from_folder(tmp_path)


def test_languages_take_the_place_of_those_in_the_file():
    tokenizer = PretrainedTokenizer(tokenizer_of("mbart").to_str(), SpecialTokens((2,), 2, 1))
    assert tokenizer.sources(["one"]) == [[4, 6, 2]]
    german = tokenizer.for_languages(source="de_DE", target="en_XX")
    assert german.sources(["one", ""]) == [[5, 6, 2], [5, 2]]
    assert german.targets(["one"]) == [[2, 4, 6, 2]]
    assert german.decode([4, 6, 2]) == "one"
    assert tokenizer.sources(["one"]) == [[4, 6, 2]]
    # Only one of both.
    assert tokenizer.for_languages(target="de_DE").sources(["one"]) == [[4, 6, 2]]
    assert tokenizer.for_languages(source="de_DE").targets(["one"]) == tokenizer.targets(["one"])
    with pytest.raises(ValueError, match=r"language \(xx\) must be a token of the tokenizer"):
        tokenizer.for_languages(target="xx")
    plain = PretrainedTokenizer(tokenizer_of("t5").to_str(), SpecialTokens((1,), 0, 0))
    with pytest.raises(ValueError, match=r"language of the source \(<unk>\).* puts none"):
        plain.for_languages(source="<unk>")


def test_lone_surrogates_are_refused(bart):
    for encode in (bart.sources, bart.targets, bart.prompts, bart.inputs):
        with pytest.raises(ValueError, match=r"character 1 \(U\+D800\) is a lone surrogate"):
            encode(["a\ud800"])


def test_long_inputs_are_cut_between_their_special_tokens(bart):
    assert bart.cut(["five four three two", "one"], 4) == [[0, 8, 7, 2], [0, 4, 2]]
    assert bart.inputs(["five four three two"]) == [[0, 8, 7, 6, 5, 2]]
    with pytest.raises(ValueError, match="a length of 2 leaves no room beside 2 special tokens"):
        bart.cut(["one"], 2)
