"""A run: what it leaves behind, how it resumes, and what it refuses."""

import dataclasses
import importlib.metadata
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

import train.evaluate
import train.update.step
from seqattn.models import Learned
from train.checkpoints import run
from train.checkpoints.checkpoints import Checkpoints
from train.checkpoints.lock import RunLock
from train.data.batches import Batches
from train.devices.parallel import Sharded
from train.engine import loop
from train.objectives import SequenceToSequence
from train.reports.metrics import read_metrics
from train.tasks import ParallelFiles
from train.update.optimizer import SGD, Optimizer


def parameters(folder):
    return jax.tree.leaves(run.load(folder).model)


def test_a_run_leaves_everything_in_its_folder(finished):
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*")}
    expected = {"config.json", "tokenizer.json", "metrics.jsonl", "samples.jsonl", "results.json", "curves.png"}
    assert expected | {"curves.svg", "attention/1.png", "attention/1.svg", "checkpoints/12"} <= names
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["12"]  # keep_checkpoints is 1
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


@pytest.mark.parametrize("steps", [7, 10], ids=["between_evaluations", "before_an_evaluation"])
def test_c11_e15_an_interrupted_run_with_dropout_resumes_to_the_same_parameters_bitwise(
    steps, tiny, finished, tmp_path, interrupted
):
    experiment = dataclasses.replace(tiny, run=tmp_path / "stopped")
    interrupted(experiment, steps)
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


def test_d17_other_steps_or_another_seed_are_refused_with_the_fields(finished, tiny):
    other = dataclasses.replace(tiny, run=finished, steps=13, seed=1)
    with pytest.raises(ValueError, match=r"(?s)seed: 3 and 1.*steps: 12 and 13.*--run, or --accept-changes True"):
        loop.train(other)


def test_d17_other_steps_are_accepted_and_told_where_the_user_says_so(finished, tiny, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    free = dataclasses.replace(tiny.optimizer, clip_norm=None)
    other = dataclasses.replace(tiny, run=copy, steps=13, optimizer=free, accept_changes=True)
    assert loop.train(other) == 0
    said = "optimizer.clip_norm: 1.0 and None", "steps: 12 and 13"
    assert "resuming with changed settings (before and now): " + "; ".join(said) in caplog.text
    checkpoints = Checkpoints(copy / "checkpoints")
    assert checkpoints.latest == 13
    assert checkpoints.texts()["changes"] == "".join(f"after 12 updates: {change}\n" for change in said)
    assert json.loads((copy / "results.json").read_text())["steps"] == 13
    block = dataclasses.replace(tiny.model.block, dropout_rate=0.2)
    another = dataclasses.replace(other, model=dataclasses.replace(tiny.model, block=block))
    with pytest.raises(ValueError, match=r"(?s)model.block.dropout_rate: 0.1 and 0.2.*another folder with --run$"):
        loop.prepare(another)
    config = (copy / "config.json").read_bytes()
    with pytest.raises(ValueError, match="does not fit this model"):
        loop.prepare(dataclasses.replace(other, optimizer=Optimizer(SGD(), tiny.optimizer.schedule)))
    assert (copy / "config.json").read_bytes() == config


def test_d17_fewer_steps_than_there_are_updates_are_refused(finished, tiny):
    with pytest.raises(ValueError, match=r"steps \(11\) must be at least the 12 updates that .* has"):
        loop.prepare(dataclasses.replace(tiny, run=finished, steps=11, accept_changes=True))


def test_what_is_only_shown_may_differ_on_resumption(finished, tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    other = dataclasses.replace(tiny, run=copy, log_every=5, evaluate_every=6, keep_checkpoints=2, bleu=False)
    assert int(loop.prepare(other).state.step) == tiny.steps


def test_c12_other_examples_under_the_same_settings_are_refused(finished, tiny, monkeypatch):
    splits = tiny.task.load()
    first = splits["test"][0] | {"source": "changed"}
    splits["test"] = splits["test"].map(lambda row, index: first if index == 0 else row, with_indices=True)
    monkeypatch.setattr(type(tiny.task), "load", lambda task: splits)
    with pytest.raises(ValueError, match="the data changed since"):
        loop.prepare(dataclasses.replace(tiny, run=finished))


def test_c12_files_may_have_moved(tiny, tmp_path):
    def task(folder):
        folder.mkdir()
        (folder / "x").write_text("\n".join(map(str, range(40))))
        return ParallelFiles(source=folder / "x", target=folder / "x", validation_examples=3, test_examples=3)

    before, after = (dataclasses.replace(tiny, task=task(tmp_path / name)) for name in ("a", "b"))
    assert run.changes(tmp_path, run.to_text(before), after) == []
    fewer = dataclasses.replace(after, task=dataclasses.replace(after.task, test_examples=2))
    with pytest.raises(ValueError, match=r"task\.test_examples: 3 and 2"):
        run.changes(tmp_path, run.to_text(before), fewer)


def test_a_run_that_goes_on_makes_no_state_but_that_of_its_checkpoint(finished, tiny, monkeypatch):
    restore, seen = Checkpoints.restore, []
    monkeypatch.setattr(Checkpoints, "restore", lambda self, like: seen.append(like) or restore(self, like))
    session = loop.prepare(dataclasses.replace(tiny, run=finished))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(seen[0]))
    optimizer = tiny.optimizer.make(tiny.steps)
    _, begun = train.update.step.start(run.build(session.experiment.model, seed=3), optimizer)
    assert jax.tree.structure(seen[0]) == jax.tree.structure(begun)


def test_d12_a_run_of_pmap_goes_on_over_a_mesh(finished, tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    before = loop.prepare(dataclasses.replace(tiny, run=finished)).state
    session = loop.prepare(dataclasses.replace(tiny, run=copy, parallel=Sharded(fsdp=2, tensor=2)))
    split = 0
    for ours, theirs, where in zip(
        *map(jax.tree.leaves, (session.state, before, session.placed.shardings(before))), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.sharding == where
        split += not where.is_fully_replicated
    assert split > 10


@pytest.mark.slow
def test_e5_a_run_on_a_mesh_reports_what_one_without_parts_does(tiny, tmp_path):
    """From the first weights to the mean of two checkpoints, with a moving average; only sums are added differently."""
    block = dataclasses.replace(tiny.model.block, model_dim=16, hidden_dim=32, num_heads=2)
    settings = {"model": dataclasses.replace(tiny.model, block=block), "average": 2, "keep_checkpoints": 3, "ema": 0.5}
    found = []
    for name, parallel in (("rows", Sharded()), ("parts", Sharded(data=2, fsdp=2, tensor=2))):
        assert loop.train(dataclasses.replace(tiny, **settings, run=tmp_path / name, parallel=parallel)) == 0
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        losses = [row["loss"] for row in rows if row["kind"] == "validation"]
        found.append([*losses, json.loads((tmp_path / name / "results.json").read_text())["loss"]])
        assert list((tmp_path / name / "attention").iterdir())
    np.testing.assert_allclose(*found, rtol=2e-3)


def test_c11_other_versions_are_told(finished, tiny, monkeypatch, caplog):
    assert json.loads(loop.prepare(dataclasses.replace(tiny, run=finished)).texts["versions"])["jax"] == jax.__version__
    assert "other versions" not in caplog.text
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99" if name == "grain" else version(name))
    loop.prepare(dataclasses.replace(tiny, run=finished))
    assert f"grain {version('grain')}, now 99: another version may change" in caplog.text


@pytest.mark.parametrize(
    ("batches", "words"),
    [({"max_length": 1}, "all 101 training examples are longer"), ({"tokens": 12}, "has no room for")],
)
def test_batches_that_cannot_be_made_are_refused_before_anything_is_written(batches, words, tiny, tmp_path):
    wrong = dataclasses.replace(tiny, run=tmp_path / "new", batches=dataclasses.replace(tiny.batches, **batches))
    with pytest.raises(ValueError, match=words):
        loop.train(wrong)
    assert not wrong.run.exists()


def test_labels_of_any_split_that_training_lacks_are_refused_before_anything_is_written(tagging, tmp_path, monkeypatch):
    splits = tagging.task.load()
    odd = splits["test"].map(lambda row: row | {"target": "?" * len(row["target"])})
    monkeypatch.setattr(type(tagging.task), "load", lambda task: splits | {"test": odd})
    with pytest.raises(ValueError, match=r"the labels \['\?'\] are not in the training split"):
        loop.train(dataclasses.replace(tagging, run=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_where_an_error_came_from_is_written_down(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Meter, "add", lambda *_: "abc".index("z"))
    with pytest.raises(ValueError, match="substring not found"):
        loop.train(dataclasses.replace(tiny, run=tmp_path / "new"))
    assert 'lambda *_: "abc".index("z")' in (tmp_path / "new" / "traceback.txt").read_text()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="all 101 training examples"):
        loop.train(dataclasses.replace(tiny, run=tmp_path / "new", batches=Batches(max_length=1)))
    assert "all 101 training examples" in (tmp_path / "new" / "traceback.txt").read_text()


@pytest.mark.parametrize("content", ["", '{"type": "Exp'])
def test_a_folder_killed_before_its_first_checkpoint_begins_anew(content, tiny, tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "config.json").write_text(content)
    session = loop.prepare(dataclasses.replace(tiny, run=tmp_path))
    assert int(session.state.step) == 0
    assert (tmp_path / "config.json").read_text("utf-8") == session.texts["config"]
    assert (tmp_path / "tokenizer.json").read_text("utf-8") == session.objective.tokenizer.to_json()


def test_the_seed_decides_parameters_and_order(tiny, tmp_path):
    first, second = (
        loop.prepare(dataclasses.replace(tiny, run=tmp_path / str(seed), seed=seed)).model for seed in (0, 1)
    )
    assert not np.array_equal(first.embedding.table[...], second.embedding.table[...])


def test_training_uses_every_setting(finished, tiny, monkeypatch, tmp_path):
    """What reaches the step and the order of batches, and what is logged."""
    seen = {}

    def make_update(*arguments, **settings):
        seen.update(update=settings)
        return train.update.step.make_update(*arguments, seed=0)

    def stream(config, rows, **settings):
        seen.update(stream=settings)
        raise InterruptedError

    monkeypatch.setattr("train.engine.session.make_update", make_update)
    monkeypatch.setattr("train.engine.session.stream", stream)
    settings = {"pieces": 2, "compute_dtype": "bfloat16", "ema": 0.9, "max_skipped": 7}
    with pytest.raises(InterruptedError):
        loop.train(dataclasses.replace(tiny, run=tmp_path / "new", **settings))
    assert seen["update"] == {
        "seed": 3,
        "label_smoothing": 0.1,
        "pieces": 2,
        "compute_dtype": "bfloat16",
        "decay": 0.9,
        "patience": 7,
        "prepare": tiny.parallel.prepare,
    }
    assert seen["stream"] == {"seed": 3, "multiple": 2 * jax.local_device_count(), "lengths": 1, "part": (0, 1)}
    rows = [row for row in read_metrics(finished / "metrics.jsonl") if row["kind"] == "train"]
    schedule = tiny.optimizer.schedule.schedule(tiny.steps)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    # Checkpoints of steps 5 and 10; that of the last one is followed by no row.
    assert [row["save_seconds"] > 0 for row in rows] == [False, False, True, False, False, True]
    np.testing.assert_allclose([row["learning_rate"] for row in rows], [schedule(row["step"] - 1) for row in rows])


def test_a22_texts_beyond_the_learned_positions_are_refused_before_training(tiny, tmp_path):
    model = dataclasses.replace(tiny.model, positions=Learned(max_length=5))
    with pytest.raises(ValueError, match=r"a target of 6 tokens; raise --model.positions.max-length \(5\)"):
        loop.train(dataclasses.replace(tiny, run=tmp_path / "new", model=model))
    assert not (tmp_path / "new").exists()


@pytest.fixture
def poisoned(tiny, tmp_path, monkeypatch):
    """Trains a run whose loss is NaN in the batches of these numbers."""

    def train(numbers, **settings):
        loss = SequenceToSequence.loss

        def with_nan(model, batch, **options):
            total, count = loss(model, batch, **options)
            return jax.numpy.where(batch["source"].min() < 0, jax.numpy.nan, total), count

        def iterate(order, *, start, batches=loop.iterate):
            for number, batch in enumerate(batches(order, start=start), start + 1):
                yield batch | {"source": batch["source"] * (-1 if number in numbers else 1)}

        monkeypatch.setattr(SequenceToSequence, "loss", staticmethod(with_nan))
        monkeypatch.setattr(loop, "iterate", iterate)
        return loop.train(dataclasses.replace(tiny, run=tmp_path / "new", **settings))

    return train


@pytest.mark.parametrize(("log_every", "seen"), [(1, 5), (100, 6)])
def test_e3_a_run_that_diverges_stops_and_names_its_last_good_checkpoint(log_every, seen, poisoned, tmp_path):
    """From its seventh batch on the loss is NaN, and step 10 has the parameters of before.

    Who logs rarely looks rarely, here at the end.
    """
    told = rf"not finite in {seen} updates in a row, .* the last good one is .*/checkpoints/10;"
    with pytest.raises(ValueError, match=told):
        poisoned(range(7, 13), log_every=log_every, max_skipped=5)
    assert run.load(tmp_path / "new").step == 10
    if log_every == 1:
        rows = [row for row in read_metrics(tmp_path / "new" / "metrics.jsonl") if row["kind"] == "train"]
        assert [row["skipped"] for row in rows] == [0] * 6 + [1, 2, 3, 4, 5]
        assert np.isnan(rows[-1]["loss"])


def test_e3_a_run_whose_last_update_was_left_out_is_saved_and_judged_as_it_is(poisoned, tmp_path):
    assert poisoned([12]) == 0
    assert run.load(tmp_path / "new").step == 12
    rows = [row for row in read_metrics(tmp_path / "new" / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["skipped"] for row in rows] == [0] * 5 + [1]


def test_a_folder_of_other_files_is_refused(tiny, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds files but no run"):
        loop.train(dataclasses.replace(tiny, run=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("names", [("config.json", "model.safetensors"), ("config.json", "tokenizer.json")])
def test_a_folder_of_somebodys_model_is_refused_and_left_alone(names, tiny, tmp_path):
    for name in names:
        (tmp_path / name).write_text("theirs")
    with pytest.raises(ValueError, match=r"holds an exported model|holds files but no run"):
        loop.train(dataclasses.replace(tiny, run=tmp_path))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "theirs")


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
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        for batch in itertools.islice(loop.iterate(session.batches, start=0), 9):
            session.state, _ = session.placed.update(session.state, batch)
    compiled = [record for record in caplog.records if record.getMessage().startswith("Compiling")]
    assert len(compiled) == tiny.batches.buckets


def test_d2_a_run_of_which_no_checkpoint_is_whole_is_not_begun_anew(finished, tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "checkpoints" / "12" / "digests.json").unlink()
    with pytest.raises(ValueError, match=r"every checkpoint in .*/copy/checkpoints is damaged; .* --run"):
        loop.train(dataclasses.replace(tiny, run=copy))
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["12"]


def test_d13_e18_a_run_that_is_being_trained_is_refused(tiny, tmp_path):
    with RunLock(tmp_path), pytest.raises(ValueError, match=rf"{tmp_path} is being trained by process \d+"):
        loop.train(dataclasses.replace(tiny, run=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
