"""A run: what it leaves behind, how it resumes, and what it refuses."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from train import loop, run
from train.log import read_metrics


def parameters(folder):
    return jax.tree.leaves(run.load(folder).model)


def test_a_run_leaves_everything_in_its_folder(finished):
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*")}
    expected = {"config.json", "tokenizer.json", "metrics.jsonl", "samples.jsonl", "results.json", "curves.png"}
    assert expected | {"curves.svg", "attention/1.png", "attention/1.svg", "checkpoints/12"} <= names
    results = json.loads((finished / "results.json").read_text())
    assert 0 <= results["exact_match"] <= 1
    assert {"loss", "bleu", "chrf", "sacrebleu", "examples"} <= results.keys()


def test_the_loss_falls(finished):
    losses = [row["loss"] for row in read_metrics(finished / "metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]


def test_every_evaluation_writes_triples(finished):
    samples = read_metrics(finished / "samples.jsonl")
    assert sorted({row["step"] for row in samples}) == [5, 10]
    assert all(row["target"] == row["source"][::-1] and isinstance(row["output"], str) for row in samples)


def stop_after(steps, monkeypatch):
    """Training that a signal interrupts after so many steps."""
    received = loop.Interrupts._note
    batches = loop.iterate

    def interrupted(order, *, start):
        for count, batch in enumerate(batches(order, start=start), start + 1):
            if count == steps:
                received(handlers[-1], 15, None)
            yield batch

    handlers = []

    class Noted(loop.Interrupts):
        def __enter__(self):
            handlers.append(self)
            return super().__enter__()

    monkeypatch.setattr(loop, "iterate", interrupted)
    monkeypatch.setattr(loop, "Interrupts", Noted)


def test_an_interrupted_run_resumes_to_the_same_parameters_bitwise(tiny, finished, tmp_path, monkeypatch):
    steps = 7  # two after an evaluation, none on a row of metrics
    experiment = dataclasses.replace(tiny, run=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_after(steps, patch)
        assert loop.train(experiment) == 143
    assert run.load(experiment.run).step == steps
    assert loop.train(experiment) == 0
    for before, after in zip(parameters(finished), parameters(experiment.run), strict=True):
        np.testing.assert_array_equal(before, after)
    rows, whole = (read_metrics(folder / "metrics.jsonl") for folder in (experiment.run, finished))
    assert [(row["step"], row["kind"], row["loss"]) for row in rows] == [
        (row["step"], row["kind"], row["loss"]) for row in whole
    ]


def test_a_finished_run_is_only_judged_again(finished, tiny, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "results.json").unlink()
    assert loop.train(dataclasses.replace(tiny, run=copy)) == 0
    assert (copy / "results.json").read_text() == (finished / "results.json").read_text()
    assert "updates" not in capsys.readouterr().out


def test_another_configuration_is_refused_with_the_fields(finished, tiny):
    other = dataclasses.replace(tiny, run=finished, steps=13, seed=1)
    with pytest.raises(ValueError, match=r"(?s)seed: 0 and 1.*steps: 12 and 13.*--run"):
        loop.train(other)


def test_a_folder_of_other_files_is_refused(tiny, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds files but no run"):
        loop.train(dataclasses.replace(tiny, run=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_folder_is_refused(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        loop.train(dataclasses.replace(tiny, run=tmp_path / "file"))


def test_c16_a_table_smaller_than_the_vocabulary_is_refused(tiny, tmp_path):
    model = dataclasses.replace(tiny.model, vocab_size=5)
    with pytest.raises(ValueError, match=r"vocab_size of the model \(5\) is below"):
        loop.train(dataclasses.replace(tiny, run=tmp_path / "new", model=model))


def test_e13_one_compilation_for_each_bucket(tiny, tmp_path, caplog):
    tiny = dataclasses.replace(tiny, batches=dataclasses.replace(tiny.batches, buckets=2))
    session = loop.prepare(dataclasses.replace(tiny, run=tmp_path / "new"))
    update = loop.data_parallel(loop.make_update(session.graph, tiny.optimizer.make(tiny.steps), seed=0))
    rows = loop.examples(session.splits["train"], session.tokenizer)
    order = loop.stream(tiny.batches, rows, seed=0, multiple=jax.local_device_count())
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        for batch in itertools.islice(loop.iterate(order, start=0), 9):
            session.state, _ = update(session.state, batch)
    compiled = [record for record in caplog.records if record.getMessage().startswith("Compiling")]
    assert len(compiled) == tiny.batches.buckets
