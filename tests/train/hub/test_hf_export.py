"""Our models with their tokenizers as folders of transformers, read by us and by transformers."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import models

from seqattn.interop.huggingface import from_huggingface, huggingface_config
from tests.huggingface_folders import write
from tests.huggingface_models import CONFIGS, arrays_of
from train import export
from train.checkpoints import run
from train.data.pretrained_tokenizer import PretrainedTokenizer
from train.data.sentence_pieces import SentencePieces
from train.data.tokenizer import Characters, SpecialTokens, Tokenizer
from train.export import Arguments
from train.hub import hf_folder, loading
from train.hub.hf_export import files_of
from train.inference.completer import Completer
from train.inference.translator import Translator

TOKENS = Tokenizer.train(Characters(), ["abcdefg"])
TEXTS = ["abc", "gfedcb", "d"]


@pytest.fixture
def exported(tiny, tmp_path, monkeypatch):
    """Exports a model of a family with our own tokenizer; returns the run and the folder."""

    def make(name, **flags):
        model = from_huggingface(CONFIGS[name], arrays_of(CONFIGS[name]))
        experiment = dataclasses.replace(tiny, model=model.config)
        made = run.Run(tmp_path / "run", experiment, TOKENS, (), 3, model, "digest")
        monkeypatch.setattr(run, "load", lambda *_, **__: made)
        folder = tmp_path / "exported"
        export.main(Arguments(made.folder, folder, family=CONFIGS[name]["model_type"], **flags))
        return made, folder

    return make


@pytest.mark.parametrize("name", ["marian", "bart"])
def test_an_encoder_decoder_translates_as_before(exported, capsys, name):
    made, folder = exported(name)
    listed = "config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json"
    assert capsys.readouterr().out == f"{folder}: {listed}\n"
    again = hf_folder.load(f"hf:{folder}")
    assert again.tokenizer.sources([*TEXTS, ""]) == TOKENS.sources([*TEXTS, ""])
    assert again.tokenizer.targets(TEXTS) == TOKENS.targets(TEXTS)
    before = Translator(made.model, made.tokenizer, max_length=7)(TEXTS)
    assert Translator(again.model, again.tokenizer, max_length=7)(TEXTS) == before
    fields = json.loads((folder / "generation_config.json").read_text("utf-8"))
    assert fields["max_length"] == (13 if name == "bart" else 512)


def test_a_language_model_goes_on_as_before(exported):
    made, folder = exported("llama")
    again = hf_folder.load(f"hf:{folder}")
    assert again.tokenizer.prompts([*TEXTS, ""]) == TOKENS.prompts([*TEXTS, ""])
    before = Completer(made.model, made.tokenizer, length=4)(TEXTS)
    assert Completer(again.model, again.tokenizer, length=4)(TEXTS) == before


def test_an_encoder_reads_as_before(exported):
    _, folder = exported("bert, masked")
    assert hf_folder.load(f"hf:{folder}").tokenizer.inputs(TEXTS) == TOKENS.inputs(TEXTS)
    assert not (folder / "generation_config.json").exists()


def test_another_folder_gives_its_tokenizer_and_defaults(exported, tmp_path):
    like = write(tmp_path / "like", "bart", generation={"num_beams": 5, "eos_token_id": 2})
    _, folder = exported("bart", like=like)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (like / name).read_bytes()


def test_a_model_of_transformers_keeps_its_tokenizer(exported, tmp_path, monkeypatch):
    theirs = loading.load_trained(Path(f"hf:{write(tmp_path / 'mbart', 'mbart', forced_bos_token_id=5)}"))
    monkeypatch.setattr("tests.train.hub.test_hf_export.TOKENS", theirs.tokenizer)
    _, folder = exported("mbart")
    again = hf_folder.load(f"hf:{folder}")
    assert again.tokenizer.special == theirs.tokenizer.special
    assert again.tokenizer.sources(["one two"]) == theirs.tokenizer.sources(["one two"]) == [[4, 6, 7, 2]]


def test_flags_of_the_other_format_are_refused(tmp_path):
    def refused(message, **flags):
        with pytest.raises(ValueError, match=message):
            export.main(Arguments(tmp_path / "run", tmp_path / "new", **flags))

    refused("--push-to is for our own format: it has no effect with --family", family="t5", push_to="a/b")
    refused("--license is for our own format", family="t5", license="mit")
    refused("--stablehlo is for our own format", family="t5", stablehlo=True)
    refused("--like is for a folder of transformers: it needs --family", like=tmp_path)


def test_a_family_that_has_no_such_model_is_refused(exported, tmp_path):
    exported("bart")
    with pytest.raises(ValueError, match="llama"):
        export.main(Arguments(tmp_path / "run", tmp_path / "other", family="llama"))
    with pytest.raises(ValueError, match="--family: model_type must be one of"):
        export.main(Arguments(tmp_path / "run", tmp_path / "other", family="unheard_of"))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["marian", "bart", "llama"])
def test_transformers_generates_the_same_texts(exported, name):
    pytest.importorskip("torch", reason="PyTorch is not installed: make test-hf runs this")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: make test-hf runs this")
    made, folder = exported(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if name == "llama":
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        for text, expected in zip(TEXTS, Completer(made.model, TOKENS, length=5)(TEXTS), strict=True):
            given = tokenizer([text], return_tensors="pt")
            given.pop("token_type_ids", None)
            tokens = peer.generate(**given, max_new_tokens=5, do_sample=False)[0, given["input_ids"].shape[1] :]
            assert TOKENS.decode(tokens.tolist()) == expected
        return
    peer = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    given = tokenizer(TEXTS, padding=True, return_tensors="pt")
    given.pop("token_type_ids", None)
    found = peer.generate(**given, max_new_tokens=7)[:, 1:]
    texts = [TOKENS.decode(row) for row in found.tolist()]
    assert texts == Translator(made.model, TOKENS, max_length=7)(TEXTS)


def test_an_ordinary_token_is_no_padding():
    # GPT-2 has no padding token. As one, an ordinary token would be left out of each output of transformers.
    model = SimpleNamespace(config=huggingface_config(CONFIGS["gpt2"]), room=lambda _: 9)
    pipeline = tokenizers.Tokenizer(models.WordLevel({"!": 0, "one": 1, "<|endoftext|>": 2}, unk_token="!"))
    pipeline.add_special_tokens(["<|endoftext|>"])
    tokenizer = PretrainedTokenizer(pipeline.to_str(), SpecialTokens((2,), 2, 2))
    assert tokenizer.pad_id == 0
    files = files_of(tokenizer, model)
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == "<|endoftext|>"
    assert json.loads(files["generation_config.json"])["pad_token_id"] == 2


def test_sentence_pieces_need_the_folder_that_they_came_from():
    tokenizer = object.__new__(SentencePieces)
    with pytest.raises(ValueError, match=r"--family: the tokenizer has SentencePiece models: give .* --like FOLDER"):
        files_of(tokenizer, SimpleNamespace(config=None))
