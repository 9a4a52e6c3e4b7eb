"""Folders of transformers as trained models: model, tokenizer, labels and defaults of decoding together."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.decoding import MinLength, Stopping
from tests.huggingface_folders import WORDS, write
from train import objectives
from train.hub import hf_folder, loading
from train.hub.pretrained import load_config
from train.inference.completer import Completer
from train.inference.translator import Beam, Translator

TEXTS = ["one two three", "five", "", "four four"]


def test_an_encoder_decoder_translates(tmp_path):
    fields = {"num_beams": 3, "min_length": 4, "max_length": 9, "forced_bos_token_id": 0, "eos_token_id": 2}
    trained = loading.load_trained(Path(f"hf:{write(tmp_path / 'bart', 'bart', generation=fields)}"))
    assert (trained.objective, trained.step, trained.labels) == ("SequenceToSequence", 0, ())
    assert (trained.decoding.beam_size, trained.decoding.stopping) == (3, Stopping.LIKELY)
    loading.check_serves(trained, "translate", objectives.SequenceToSequence)
    processors = (MinLength(4, 2),)
    translator = Translator(
        trained.model, trained.tokenizer, search=Beam(3), processors=processors, max_length=9, batch_size=3
    )
    found = translator(TEXTS)
    assert found[2] == ""
    assert all(set(text.split()) <= {*WORDS, "<unk>"} for text in found)
    assert found == [translator([text])[0] for text in TEXTS]


def test_a_language_model_completes(tmp_path):
    trained = hf_folder.load(f"hf:{write(tmp_path / 'llama', 'llama')}")
    assert trained.objective == "Continuation"
    completer = Completer(trained.model, trained.tokenizer, length=5)
    assert len(completer(["one two", ""])) == 2


@pytest.mark.parametrize(
    ("name", "objective", "labels"),
    [
        ("bert", "", ()),
        ("bert, masked", "Masking", ()),
        ("bert, texts", "Classification", ("a", "b", "c")),
        ("bert, tokens", "Tagging", ("a", "b", "c")),
    ],
)
def test_an_encoder_has_the_objective_of_its_head(tmp_path, name, objective, labels):
    trained = hf_folder.load(f"hf:{write(tmp_path / 'bert', name)}")
    assert (trained.objective, trained.labels) == (objective, labels)
    assert trained.tokenizer.inputs(["one"]) == [[2, 5, 3]]
    with pytest.raises(ValueError, match=r"python -m train\.(embed|evaluate)"):
        loading.check_serves(trained, "translate", objectives.SequenceToSequence)


def test_labels_must_be_those_of_the_model(tmp_path):
    folder = write(tmp_path / "bert", "bert, texts", id2label={"0": "a", "1": "a", "2": "c"})
    with pytest.raises(ValueError, match=r"config\.json: id2label must name 3 different labels"):
        hf_folder.load(f"hf:{folder}")


@pytest.mark.parametrize("labels", [["a", "b", "c"], "abc", {"0": "a", "1": "b", "2": None}])
def test_labels_must_be_an_object_of_texts(tmp_path, labels):
    folder = write(tmp_path / "bert", "bert, texts")
    config = load_config(folder)
    fields = json.loads((folder / "config.json").read_text("utf-8")) | {"id2label": labels}
    (folder / "config.json").write_text(json.dumps(fields), "utf-8")
    with pytest.raises(ValueError, match=r"config\.json: id2label must map ids to labels, got"):
        hf_folder.labels_of(folder, config)


def test_banned_tokens_that_the_model_lacks_are_refused(tmp_path):
    folder = write(tmp_path / "bart", "bart", generation={"eos_token_id": 2, "bad_words_ids": [[3], [11]]})
    with pytest.raises(ValueError, match=r"bad_words_ids must be below the vocabulary size \(11\), got 11"):
        hf_folder.load(f"hf:{folder}")


def test_a_vocabulary_that_the_model_lacks_is_refused(tmp_path):
    folder = write(tmp_path / "t5", "t5", vocab_size=7, eos_token_id=1)
    with pytest.raises(ValueError, match=r"tokenizer\.json: it has 8 tokens, but the model has only 7"):
        hf_folder.load(f"hf:{folder}")


def test_a_family_that_we_lack_is_one_sentence(tmp_path):
    folder = write(tmp_path / "t5", "t5")
    fields = json.loads((folder / "config.json").read_text("utf-8")) | {"model_type": "unheard_of"}
    (folder / "config.json").write_text(json.dumps(fields), "utf-8")
    with pytest.raises(ValueError, match="unheard_of"):
        hf_folder.load(f"hf:{folder}")


@pytest.mark.parametrize("name", ["hf:no-such-folder", "hf:", "hf:a/b/c", "hf:../x"])
def test_what_is_neither_folder_nor_name_is_refused_without_a_network(name):
    with pytest.raises(FileNotFoundError, match="is not a folder, and the hub gives no model of this name"):
        hf_folder.folder_of(name)


def test_a_name_of_the_hub_is_downloaded_without_pickles(tmp_path, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hf_folder.huggingface_hub, "snapshot_download", download)
    assert hf_folder.folder_of("hf:someone/model") == tmp_path
    assert asked["name"] == "someone/model"
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["patterns"])


def test_half_precision_is_kept_where_it_is_wanted(tmp_path):
    trained = hf_folder.load(f"hf:{write(tmp_path / 't5', 't5', eos_token_id=1)}", param_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(trained.model, nnx.Param))} == {np.dtype(jnp.bfloat16)}
