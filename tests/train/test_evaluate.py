"""Scores against what they are defined as."""

import dataclasses
import json
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu
from datasets import Dataset

from seqattn import Coordinates
from tests.huggingface_folders import write
from train import evaluate, objectives
from train.checkpoints import run
from train.data.batches import collate
from train.evaluate import Arguments
from train.hub import hf_folder
from train.inference.translator import Translator
from train.objectives import SequenceToSequence
from train.tasks.task import splits


@pytest.fixture(scope="module")
def trained(finished):
    return run.load(finished)


@pytest.fixture(scope="module")
def split(trained):
    sources = ["ab", "cdefg", "xyz", "q"]
    outputs = Translator(trained.model, trained.tokenizer)(sources)
    return Dataset.from_dict({"source": sources, "target": [outputs[0], "gfedc", outputs[2], "q"]})


def test_exact_match_counts_equal_outputs(trained, split):
    scores = SequenceToSequence(trained.tokenizer).evaluate(trained.model, split)
    equal = [output == target for output, target in zip(scores.outputs, split["target"], strict=True)]
    assert sum(equal) >= 2
    assert scores.numbers["exact_match"] == sum(equal) / 4
    assert scores.numbers.keys() == {"loss", "exact_match"}


def test_the_loss_is_the_mean_over_labels_whatever_the_batches(trained, split):
    objective = SequenceToSequence(trained.tokenizer)
    rows = objective.examples(split)
    total, count = objective.loss(trained.model, jax.tree.map(jnp.asarray, collate(rows)))
    for size in (1, 3, 8):
        mean = objective.mean_loss(trained.model, split, batch_size=size)
        np.testing.assert_allclose(mean, total / count, rtol=1e-5)
    assert count == sum(len(target) - 1 for _, target in rows)


def test_bleu_is_sacrebleus(trained, split):
    scores = SequenceToSequence(trained.tokenizer, bleu=True).evaluate(trained.model, split)
    assert scores.numbers["bleu"] == sacrebleu.corpus_bleu(scores.outputs, [list(split["target"])]).score
    for name, case in (("bleu", "mixed"), ("bleu_lowercase", "lc")):
        assert f"case:{case}|eff:no|tok:13a" in scores.signatures[name]
    assert "nc:6|nw:0" in scores.signatures["chrf"]


def test_the_command_prints_what_training_measured(finished, capsys):
    evaluate.main(Arguments(finished))
    printed = capsys.readouterr().out
    results = json.loads((finished / "results.json").read_text())
    assert f"exact_match: {results['exact_match']:.4f}" in printed
    assert f"loss: {results['loss']:.4f}" in printed
    assert "5 examples, after 12 updates" in printed


def test_the_command_takes_so_many_examples(finished, capsys):
    evaluate.main(Arguments(finished, split="validation", examples=2))
    assert "validation split" in (printed := capsys.readouterr().out)
    assert ": 2 examples, after 12 updates" in printed
    with pytest.raises(ValueError, match=r"--examples \(0\) must be an integer of at least 1"):
        evaluate.main(Arguments(finished, examples=0))


def test_the_command_takes_the_mean_of_checkpoints(finished, trained, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"average \(2\) must be at most 1, .*--keep-checkpoints"):
        evaluate.main(Arguments(finished, average=2))
    monkeypatch.setattr(run, "load", lambda folder, *, average: {3: dataclasses.replace(trained, average=3)}[average])
    evaluate.main(Arguments(finished, average=3))
    assert "5 examples, after 12 updates, the mean of 3 checkpoints" in capsys.readouterr().out


def test_the_command_searches_by_a_beam(finished, trained, monkeypatch, capsys):
    asked = []
    make = objectives.make
    monkeypatch.setattr(objectives, "make", lambda *given, **beam: asked.append(beam) or make(*given, **beam))
    evaluate.main(Arguments(finished, beam_size=3))
    evaluate.main(Arguments(finished))
    assert asked == [{"beam_size": 3}, {"beam_size": trained.experiment.beam_size}]
    assert "after 12 updates, by a beam of 3\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--beam-size \(0\) must be an integer of at least 1"):
        evaluate.main(Arguments(finished, beam_size=0))


def test_references_in_another_unicode_form_still_match():
    pairs = [("a", unicodedata.normalize("NFD", "café"))]
    assert splits(pairs, pairs, pairs)["test"]["target"] == ["café"]


def test_c12_a_split_of_other_examples_is_not_judged(trained):
    assert len(trained.splits()["test"]) == 5
    with pytest.raises(ValueError, match=r"the data changed since .* was trained"):
        dataclasses.replace(trained, data="0" * 64).splits()


def test_an_exported_model_is_not_judged(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"is an exported model and holds no checkpoints: give"):
        evaluate.main(Arguments(tmp_path))


MINE = """import dataclasses
from pathlib import Path
from train.experiments.reverse import REVERSE
from train.tasks import LabelledFiles
TASK = LabelledFiles(train=Path("{folder}/train.tsv"), test=Path("{folder}/test.tsv"))
MINE = dataclasses.replace(REVERSE, task=TASK, bleu=False)
"""


def test_a_folder_of_transformers_is_judged_on_the_task_of_an_experiment(tmp_path, capsys):
    folder = write(tmp_path / "bert", "bert, texts")
    (tmp_path / "test.tsv").write_text("one two\ta\nfive\tb\nthree four one\tc\ntwo\ta\n", "utf-8")
    others = "".join(f"one one {'two ' * n}\t{'abc'[n % 3]}\n" for n in range(60))
    (tmp_path / "train.tsv").write_text(others, "utf-8")
    (file := tmp_path / "mine.py").write_text(MINE.format(folder=tmp_path))
    evaluate.main(Arguments(Path(f"hf:{folder}"), experiment=file))
    first, *numbers = capsys.readouterr().out.splitlines()
    assert first.endswith("4 examples, after 0 updates")
    trained = hf_folder.load(f"hf:{folder}")
    ids = trained.tokenizer.inputs(["one two", "five", "three four one", "two"])
    logits = [trained.model(jnp.array([row]), Coordinates.from_lengths([len(row)], len(row)))[0] for row in ids]
    right = np.mean([int(np.argmax(x)) == label for x, label in zip(logits, (0, 1, 2, 0), strict=True)])
    assert f"accuracy: {right:.4f}" in numbers
    with pytest.raises(ValueError, match=r"has no task: give the file of an experiment with one, --experiment FILE"):
        evaluate.main(Arguments(Path(f"hf:{folder}")))
