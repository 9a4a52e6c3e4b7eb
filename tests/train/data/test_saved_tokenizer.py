"""Tokenizers of either kind, from files and from texts."""

import json

import pytest

from tests.huggingface_folders import tokenizer_of
from train.data import saved_tokenizer
from train.data.pretrained_tokenizer import PretrainedTokenizer, SpecialTokens
from train.data.tokenizer import ByteLevelBPE, Characters, SavedTokenizer, Tokenizer

OWN = Tokenizer.train(Characters(), ["abc"])
THEIRS = PretrainedTokenizer(tokenizer_of("bart").to_str(), SpecialTokens((2,), 2, 1, (0,)))


@pytest.mark.parametrize("tokenizer", [OWN, THEIRS], ids=["own", "pretrained"])
def test_a_run_may_take_the_tokenizer_of_another(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    taken = saved_tokenizer.make(SavedTokenizer(tmp_path / "tokenizer.json"), ["texts of which nothing is learned"])
    assert type(taken) is type(tokenizer)
    assert taken.to_json() == tokenizer.to_json() == saved_tokenizer.from_json(tokenizer.to_json()).to_json()
    with pytest.raises(FileNotFoundError, match=r"--tokenizer\.path: there is no file .*other\.json"):
        saved_tokenizer.make(SavedTokenizer(tmp_path / "other.json"), [])


def test_a_run_may_take_the_tokenizer_of_a_folder_of_transformers(tmp_path):
    config = {"eos_token_id": 2, "decoder_start_token_id": 2, "pad_token_id": 1, "forced_bos_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer_of("bart").save(str(tmp_path / "tokenizer.json"))
    assert saved_tokenizer.make(SavedTokenizer(tmp_path), []).to_json() == THEIRS.to_json()


def test_other_settings_are_trained():
    assert saved_tokenizer.make(Characters(), ["abc"]).to_json() == OWN.to_json()
    assert saved_tokenizer.make(ByteLevelBPE(261), ["abab"]).vocab_size == 261


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        saved_tokenizer.make(SavedTokenizer(tmp_path / "tokenizer.json"), [])
