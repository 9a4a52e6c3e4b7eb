"""Models to start from: three kinds of folders, and the model of one in place of that of an experiment."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from seqattn.interop import to_arrays
from seqattn.interop.huggingface import huggingface_config
from seqattn.models import MaskedTokens, TextLabels, TokenLabels
from tests.huggingface_folders import write
from tests.huggingface_models import CONFIGS
from train.__main__ import parse
from train.checkpoints import run
from train.config import FROM_DATA
from train.data.pretrained_tokenizer import PretrainedTokenizer
from train.data.tokenizer import SavedTokenizer
from train.hub import exported, origin
from train.hub.pretrained import load_config, load_pretrained, save_pretrained


def same(a, b):
    a, b = to_arrays(a), to_arrays(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """A folder of transformers, and its model."""
    folder = write(tmp_path_factory.mktemp("hf") / "gpt2", "gpt2")
    return folder, load_pretrained(folder)


def test_a_run_folder_is_what_it_loads(masked):
    begun, loaded = origin.read(masked), run.load(masked)
    assert (begun.config, begun.labels) == (loaded.experiment.model, ())
    assert begun.tokenizer.to_json() == loaded.tokenizer.to_json()
    assert same(begun.load(None), loaded.model)


def test_an_exported_model_is_what_it_loads(language, tmp_path):
    made = exported.Exported(tmp_path / "exported", language.model, language.tokenizer, (), "Continuation", 3)
    exported.save(made, {})
    begun = origin.read(tmp_path / "exported")
    assert begun.config == language.model.config
    assert begun.tokenizer.to_json() == language.tokenizer.to_json()
    assert same(begun.load(None), language.model)


def test_a_folder_of_transformers_is_what_it_loads(transformers):
    folder, model = transformers
    begun = origin.read(Path(f"hf:{folder}"))
    assert (begun.config, begun.labels) == (model.config, ())
    assert begun.tokenizer.to_json() == PretrainedTokenizer.from_folder(folder).to_json()
    assert begun.tokenizer_config == SavedTokenizer(folder)
    assert same(begun.load(None), model)


def test_logits_that_are_not_tied_are_in_the_config_that_is_read_without_arrays(tmp_path):
    model = run.build(dataclasses.replace(huggingface_config(CONFIGS["t5"]), tie_logits=False), seed=9)
    save_pretrained(model, "t5", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    assert load_config(tmp_path / "hf") == model.config


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:{}/none", "none is not a folder"),
        ("{}/none", "none holds no checkpoint"),
        ("hf:{}/other", r"other: model_type must be one of .*, got 'mamba'"),
    ],
)
def test_what_is_no_model_is_refused_in_one_sentence(name, words, transformers, tmp_path):
    folder, _ = transformers
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    (tmp_path / "other" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        origin.read(Path(name.format(tmp_path)))


def test_an_experiment_adopts_all_of_a_model_but_the_head_of_its_own_task(tagging, masked, tmp_path):
    there = run.load(masked).experiment.model
    own = dataclasses.replace(tagging, model=dataclasses.replace(tagging.model, num_layers=7))
    adopted = origin.adopt(own, masked, tmp_path / "new")
    assert adopted.start_from == masked
    assert adopted.model == dataclasses.replace(there, head=TokenLabels(FROM_DATA))
    masking = dataclasses.replace(own, model=dataclasses.replace(own.model, head=MaskedTokens()))
    assert origin.adopt(masking, masked, tmp_path / "new").model == there
    texts = dataclasses.replace(own.model, head=TextLabels(FROM_DATA))
    of_bert = CONFIGS["bert, texts"]
    write(tmp_path / "hf", "bert, texts")
    head = origin.adopt(
        dataclasses.replace(own, model=texts), Path(f"hf:{tmp_path / 'hf'}"), tmp_path / "new"
    ).model.head
    assert head == dataclasses.replace(huggingface_config(of_bert).head, num_labels=FROM_DATA)


def test_a_run_that_started_there_needs_nothing_of_that_folder(tagged, tagging):
    saved = run.load(tagged).experiment
    assert not saved.start_from.exists()
    assert origin.adopt(tagging, saved.start_from, tagged).model == saved.model
    # A folder that is gone leaves the experiment as it is: reading its parameters says what is missing.
    for other in (saved.start_from / "other", Path(f"hf:{saved.start_from}/other")):
        assert origin.adopt(tagging, other, tagged) == dataclasses.replace(tagging, start_from=other)


def test_flags_change_the_model_of_the_folder(masked, transformers, tmp_path):
    there = run.load(masked).experiment.model
    flags = ["--run", str(tmp_path / "new"), "--model.block.dropout-rate", "0.25"]
    model = parse(["tags", f"--start-from={masked}", *flags]).model
    block = dataclasses.replace(there.block, dropout_rate=0.25)
    assert model == dataclasses.replace(there, block=block, head=TokenLabels(FROM_DATA))
    folder, held = transformers
    experiment = parse(["own_text", "--start-from", f"hf:{folder}"])
    assert (experiment.model, experiment.start_from) == (held.config, Path(f"hf:{folder}"))
    assert parse(["own_text"]).model == parse(["own_text", "--start-from", "None"]).model != held.config
