"""Evaluations of a run: early stopping, the best checkpoints, and the mean that is judged."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import train.evaluate
import train.update.step
from train.checkpoints import run
from train.engine import loop
from train.inference.translator import Beam
from train.objectives import SequenceToSequence, Tagging
from train.reports.metrics import read_metrics


def test_validation_takes_so_many_examples(tiny, tmp_path, monkeypatch):
    session = loop.prepare(dataclasses.replace(tiny, run=tmp_path / "new"))
    taken = []

    def evaluate(model, split, **_):
        taken.append(len(split))
        return loop.Scores({"loss": 1.0, "exact_match": 0.5}, ["output"] * len(split))

    monkeypatch.setattr(session.objective, "evaluate", evaluate)
    with loop.MetricsFile(tmp_path / "metrics") as metrics, loop.MetricsFile(tmp_path / "samples") as samples:
        loop._validate(session, 5, metrics, samples, loop.Progress(12))
    assert taken == [tiny.evaluate_examples]
    assert read_metrics(tmp_path / "metrics") == [{"step": 5, "kind": "validation", "loss": 1.0, "exact_match": 0.5}]


def test_a_run_that_is_judged_by_its_moving_average(tiny, tmp_path):
    experiment = dataclasses.replace(tiny, run=tmp_path / "new", ema=0.5, steps=3, evaluate_every=3)
    assert loop.train(experiment) == 0
    session = loop.prepare(experiment)
    for mean, loaded, last in zip(
        jax.tree.leaves(session.state.average),
        jax.tree.leaves(run.load(experiment.run).model),
        jax.tree.leaves(session.state.params),
        strict=True,
    ):
        np.testing.assert_array_equal(mean, loaded)
        assert not np.array_equal(mean, last)


def test_an_evaluation_that_fails_loses_no_update(tiny, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(SequenceToSequence, "evaluate", fail)
    with pytest.raises(MemoryError):
        loop.train(dataclasses.replace(tiny, run=tmp_path / "new"))
    assert run.load(tmp_path / "new").step == tiny.evaluate_every


@pytest.fixture
def judged(tagging, tmp_path, monkeypatch):
    """A run that evaluations judge as was decided beforehand, and the parameters that each of them saw."""
    losses, seen, evaluate = iter([np.nan, 1.0, 1.0, 2.0]), [], Tagging.evaluate

    def judge(objective, model, split, **options):
        if len(split) != 1:  # the test split
            return evaluate(objective, model, split, **options)
        seen.append(jax.tree.map(np.asarray, jax.tree.leaves(model)))
        return loop.Scores({"loss": next(losses)}, [])

    monkeypatch.setattr(Tagging, "evaluate", judge)
    monkeypatch.setattr(Tagging, "draw", lambda *_: [])
    monkeypatch.setattr(loop, "learning_curves", lambda *_: None)
    settings = {"steps": 100, "evaluate_every": 2, "evaluate_examples": 1, "patience": 2, "keep_checkpoints": 3}
    return dataclasses.replace(tagging, run=tmp_path / "run", start_from=None, frozen=(), **settings), seen


def test_a_run_that_gets_worse_stops_and_goes_back_to_its_best(judged, interrupted, compiled_once, capsys):
    experiment, seen = judged
    with compiled_once():
        interrupted(experiment, 7)  # a checkpoint beside the evaluations: it must not push the best one out
        assert loop.train(experiment) == 0
    assert "stopped early: the validation loss is lowest after 4 updates, 1.0000" in capsys.readouterr().out
    trained = run.load(experiment.run)
    assert trained.step == 4
    assert len(seen) == 4
    for best, kept in zip(seen[1], jax.tree.leaves(trained.model), strict=True):
        np.testing.assert_array_equal(best, kept)
    assert not np.array_equal(seen[0][0], seen[1][0])
    results = json.loads((experiment.run / "results.json").read_text())
    assert results["steps"] == 4
    rows = read_metrics(experiment.run / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [2, 4, 6, 8]
    (experiment.run / "results.json").unlink()
    assert loop.train(experiment) == 0  # an evaluation more would be one too many
    assert json.loads((experiment.run / "results.json").read_text()) == results
    assert read_metrics(experiment.run / "metrics.jsonl") == rows
    assert run.load(experiment.run).step == 4


def test_d17_a_run_that_stopped_early_trains_on_with_other_settings(judged, compiled_once):
    experiment, seen = judged
    other = dataclasses.replace(experiment, steps=6, label_smoothing=0.2, accept_changes=True)
    with compiled_once():
        assert loop.train(experiment) == 0
        assert (run.load(experiment.run).step, len(seen)) == (4, 4)
        with pytest.raises(StopIteration):  # judged once more, for which no loss was decided
            loop.train(other)
    assert run.load(experiment.run).step == 6


def test_d2_a_run_whose_best_checkpoint_is_damaged_goes_back_to_the_next_best(
    judged, interrupted, compiled_once, capsys
):
    experiment, _ = judged
    with compiled_once():
        interrupted(experiment, 7)
        (experiment.run / "checkpoints" / "4" / "digests.json").unlink()
        assert loop.train(experiment) == 0
    assert "lowest after 6 updates, 1.0000; the best checkpoint, after 4, is damaged or gone" in capsys.readouterr().out
    assert run.load(experiment.run).step == 6


def test_d2_a_best_checkpoint_that_was_damaged_since_it_was_written_is_not_gone_back_to(
    judged, monkeypatch, compiled_once, capsys
):
    experiment, seen = judged
    judge, damaged = Tagging.evaluate, []

    def evaluate(*given, **options):
        scores = judge(*given, **options)
        if len(seen) == 4 and not damaged:
            damaged.append(max((experiment.run / "checkpoints" / "4").rglob("*"), key=lambda path: path.stat().st_size))
            content = bytearray(damaged[0].read_bytes())
            content[len(content) // 2] ^= 1
            damaged[0].write_bytes(content)
        return scores

    monkeypatch.setattr(Tagging, "evaluate", evaluate)
    with compiled_once():
        assert loop.train(experiment) == 0
    assert "lowest after 6 updates, 1.0000; the best checkpoint, after 4, is damaged or gone" in capsys.readouterr().out
    assert run.load(experiment.run).step == 6


def test_d8_the_best_checkpoints_stay_beside_the_latest_and_nan_is_none_of_them(tiny, tmp_path, monkeypatch):
    losses = iter([3.0, np.nan, 1.0, 2.0, 4.0, 5.0])

    def evaluate(objective, model, split, **_):
        return loop.Scores({"loss": next(losses)}, [])

    monkeypatch.setattr(SequenceToSequence, "evaluate", evaluate)
    monkeypatch.setattr(SequenceToSequence, "draw", lambda *_: [])
    experiment = dataclasses.replace(tiny, run=tmp_path / "new", steps=5, evaluate_every=1, keep_best=2)
    assert loop.train(experiment) == 0
    assert sorted(path.name for path in (tmp_path / "new" / "checkpoints").iterdir()) == ["3", "4", "5"]


def test_an_interruption_changes_no_mean_of_checkpoints(tiny, tmp_path, interrupted, compiled_once):
    settings = {"evaluate_every": 5, "keep_checkpoints": 2, "average": 2, "bleu": False}
    results = []
    with compiled_once():
        for name in ("whole", "stopped"):
            experiment = dataclasses.replace(tiny, run=tmp_path / name, **settings)
            if name == "stopped":
                interrupted(experiment, 11)
            assert loop.train(experiment) == 0
            results.append(json.loads((experiment.run / "results.json").read_text()))
    assert sorted(path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()) == ["10", "12"]
    assert results[0] == results[1]


def test_d2_a_checkpoint_that_was_damaged_since_it_was_written_is_in_no_mean(tiny, tmp_path, monkeypatch, capsys):
    finish = loop._finish

    def damaged(session):
        session.checkpoints.wait()
        (session.checkpoints.folder / "2" / "digests.json").write_text("{}")
        finish(session)

    monkeypatch.setattr(loop, "_finish", damaged)
    settings = {"steps": 3, "evaluate_every": 1, "keep_checkpoints": 2, "average": 2, "bleu": False}
    assert loop.train(dataclasses.replace(tiny, run=tmp_path / "new", **settings)) == 0
    assert "the mean is of 1 checkpoints, not of 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "results.json").read_text())["average"] == 1
    assert run.load(tmp_path / "new").average == 1


def test_the_test_split_is_judged_by_the_mean_of_checkpoints_and_a_beam(tiny, tmp_path, monkeypatch, capsys):
    judged = []

    def evaluate(objective, model, split, **_):
        judged.append((objective, jax.tree.map(np.asarray, jax.tree.leaves(model))))
        return loop.Scores({"loss": 1.0}, [])

    monkeypatch.setattr(SequenceToSequence, "evaluate", evaluate)
    monkeypatch.setattr(SequenceToSequence, "draw", lambda *_: [])
    settings = {"steps": 3, "evaluate_every": 1, "keep_checkpoints": 2, "average": 2, "beam_size": 3}
    assert loop.train(dataclasses.replace(tiny, run=tmp_path / "new", **settings)) == 0
    (_, second), (_, third), (objective, mean) = judged[-3:]
    for found, *parts in zip(mean, second, third, strict=True):
        np.testing.assert_allclose(found, np.mean(parts, axis=0), rtol=1e-6, atol=1e-7)
    assert objective._search == Beam(3)
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert (results["average"], results["beam_size"]) == (2, 3)
    # The same model is read, and judged in the same way, by default.
    train.evaluate.main(train.evaluate.Arguments(tmp_path / "new"))
    objective, again = judged[-1]
    assert objective._search == Beam(3)
    for found, wanted in zip(again, mean, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert "after 3 updates, the mean of 2 checkpoints, by a beam of 3" in capsys.readouterr().out
    assert run.load(tmp_path / "new").average == 2
    assert run.load(tmp_path / "new", average=1).average == 1
    shutil.copytree(tmp_path / "new", tmp_path / "damaged")
    (tmp_path / "damaged" / "checkpoints" / "2" / "digests.json").write_text("{}")
    assert run.load(tmp_path / "damaged").average == 1
    with pytest.raises(ValueError, match=r"average \(2\) must be at most 1"):
        run.load(tmp_path / "damaged", average=2)
    (tmp_path / "new" / "results.json").write_text('{"steps": 2, "average": 2, "beam_size": 3}')
    assert run.load(tmp_path / "new").average == 1  # figures of an earlier model say nothing of this one
    # Judged anew, it is what was asked for last.
    assert loop.train(dataclasses.replace(tiny, run=tmp_path / "new", **settings | {"average": 1, "beam_size": 1})) == 0
    assert (run.load(tmp_path / "new").average, run.judged_by(tmp_path / "new", 3)) == (1, (1, 1))
