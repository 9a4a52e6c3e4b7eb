"""Examples from the cache are those in memory; what changed, was damaged or belongs to others is made anew."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest

from seqattn.models import Learned, Seq2SeqConfig
from train import objectives
from train.checkpoints import run
from train.config import FROM_TOKENIZER
from train.data import tokenized
from train.data.cache_folder import CacheFolder, DataCache
from train.data.tokenizer import Characters, Tokenizer
from train.devices.parallel import Sharded
from train.engine import examples, loop
from train.engine.examples import Cached, InMemory
from train.tasks import LabelledFiles, ParallelFiles, TextFiles, translation
from train.tasks.own_files import OwnFiles
from train.update.optimizer import Optimizer
from train.update.schedules import Cosine

LINES = [f"{number:b} {'ab' * (number % 4)}" for number in range(90)]


@pytest.fixture(autouse=True)
def shards(monkeypatch):
    monkeypatch.setattr(tokenized, "SHARD", 32)


@pytest.fixture
def cached(tiny, tmp_path):
    """A tiny experiment on files, with a cache of its own."""
    files = tmp_path / "source", tmp_path / "target"
    for file, lines in zip(files, (LINES, [line[::-1] for line in LINES]), strict=True):
        file.write_text("".join(f"{line}\n" for line in lines))
    task = ParallelFiles(source=files[0], target=files[1], validation_examples=5, test_examples=4)
    cache = DataCache(tmp_path / "cache", min_megabytes=0)
    return dataclasses.replace(tiny, task=task, data_cache=cache, run=tmp_path / "run")


def in_memory(experiment):
    return dataclasses.replace(experiment, data_cache=DataCache())


def find(experiment, tokenizer=None):
    """The examples, and the objective of a new run."""
    found = examples.find(experiment)
    kind = objectives.kind(experiment)
    tokenizer = Tokenizer.train(experiment.tokenizer, found.texts(kind)) if tokenizer is None else tokenizer
    objective = objectives.make(experiment, tokenizer, found.labels(kind))
    found.use(objective)
    return found, objective


def tokens(experiment):
    """The folder of the tokens, which is the only one."""
    (folder,) = (path for path in experiment.data_cache.folder.glob("*/tokens-*") if path.suffix != ".work")
    return folder


def listed(rows):
    return [(list(map(int, source)), list(map(int, target))) for source, target in rows]


def forbid_reading(monkeypatch):
    def fail(path):
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr("train.tasks.lines.read_lines", fail)
    monkeypatch.setattr("train.data.texts.Texts.pieces", fail)


def parameters(folder):
    return jax.tree.leaves(run.load(folder).model)


def labelled(folder):
    (folder / "labelled").write_text("".join(f"{line} {n}\tlabel {n % 3}\n" for n, line in enumerate(LINES)))
    return LabelledFiles(train=folder / "labelled")


def lines(folder):
    (folder / "text").write_text("".join(f"{line} {n}\n" for n, line in enumerate(LINES)))
    return TextFiles(train=folder / "text")


@pytest.mark.parametrize("kind", ["pairs", "text", "labels"])
def test_the_cache_gives_what_is_in_memory(kind, cached, tagging, tmp_path):
    experiment = cached
    if kind == "text":
        experiment = dataclasses.replace(cached, task=lines(tmp_path), bleu=False)
    if kind == "labels":
        model = dataclasses.replace(tagging.model, head=objectives.Classification.head(0))
        experiment = dataclasses.replace(cached, task=labelled(tmp_path), model=model, bleu=False)
    (ours, objective), (theirs, other) = find(experiment), find(in_memory(experiment))
    assert isinstance(ours, Cached)
    assert isinstance(theirs, InMemory)
    assert objective.tokenizer.to_json() == other.tokenizer.to_json()
    assert objective.labels == other.labels
    assert (ours.count, ours.digest) == (theirs.count, theirs.digest)
    for split in ("train", "validation", "test"):
        assert listed(ours.rows(objective, split)) == listed(theirs.rows(other, split))
    again, objective = find(experiment)
    assert again.digest == theirs.digest
    assert listed(again.rows(objective, "train")) == listed(theirs.rows(other, "train"))
    assert len(list(tokens(experiment).glob("0*.arrow"))) == -(-ours.count // 32)


def test_small_files_and_made_up_examples_are_read_into_memory(cached, tiny):
    for experiment in (in_memory(cached), dataclasses.replace(tiny, data_cache=cached.data_cache)):
        assert isinstance(examples.find(experiment), InMemory)
    assert not cached.data_cache.folder.exists()


def test_c11_a_run_from_the_cache_is_that_in_memory_and_goes_on_bitwise_without_reading_text(
    cached, interrupted, tmp_path, monkeypatch, compiled_once, caplog
):
    whole = dataclasses.replace(in_memory(cached), run=tmp_path / "whole")
    with compiled_once():
        assert loop.train(whole) == 0
        interrupted(cached, 7)
        with monkeypatch.context() as patch:
            forbid_reading(patch)
            assert loop.train(cached) == 0
    for before, after in zip(parameters(whole.run), parameters(cached.run), strict=True):
        np.testing.assert_array_equal(before, after)
    assert json.loads((cached.run / "results.json").read_text()) == json.loads((whole.run / "results.json").read_text())
    assert "made anew" not in caplog.text


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES = {
    "flipped byte": lambda folder: flip(sorted(folder.glob("0*.arrow"))[1]),
    "truncated": lambda folder: os.truncate(sorted(folder.glob("0*.arrow"))[1], 100),
    "shard gone": lambda folder: sorted(folder.glob("0*.arrow"))[1].unlink(),
    "facts": lambda folder: flip(folder / "facts.json"),
    "texts": lambda folder: flip(folder / "validation.arrow"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_noticed_and_made_anew(damage, cached, caplog):
    found, objective = find(cached)
    before, texts, digest = listed(found.rows(objective, "train")), found.splits["validation"].to_list(), found.digest
    damage(tokens(cached))
    # Another process, which has the tokenizer from its checkpoint.
    again, objective = find(cached, objective.tokenizer)
    assert sum("it is made anew" in record.message for record in caplog.records) == 1
    assert again.digest == digest
    assert listed(again.rows(objective, "train")) == before
    assert again.splits["validation"].to_list() == texts
    caplog.clear()
    find(cached, objective.tokenizer)
    assert not caplog.records


def test_a_lost_manifest_is_written_again(cached, caplog):
    found, objective = find(cached)
    before = listed(found.rows(objective, "train"))
    inodes = {path.name: path.stat().st_ino for path in tokens(cached).glob("0*.arrow")}
    (tokens(cached) / "digests.json").unlink()
    again, objective = find(cached)
    assert listed(again.rows(objective, "train")) == before
    assert {path.name: path.stat().st_ino for path in tokens(cached).glob("0*.arrow")} == inodes
    assert find(cached)[0]._has_tokens


def test_held_out_texts_of_an_interrupted_process_are_checked(cached):
    found, objective = find(cached)
    found.rows(objective, "train")
    texts, digest = found.splits["validation"].to_list(), found.digest
    (tokens(cached) / "digests.json").unlink()  # as if it was interrupted before this file
    for name in ("validation.arrow", "summary.json"):
        flip(tokens(cached) / name)
    again, objective = find(cached, objective.tokenizer)
    again.rows(objective, "train")
    third, _ = find(cached, objective.tokenizer)
    assert third._has_tokens
    assert (third.splits["validation"].to_list(), third.digest) == (texts, digest)


def test_damaged_texts_are_read_again(cached, caplog):
    digest = find(cached)[0].digest
    (texts,) = cached.data_cache.folder.glob("*/texts")
    flip(texts / "train.arrow")
    assert find(cached)[0].digest == digest
    assert "train.arrow: its content changed after it was written; it is made anew" in caplog.text


def test_another_tokenizer_has_tokens_of_its_own_and_foreign_ones_are_noticed(cached, caplog):
    found, objective = find(cached)
    found.rows(objective, "train")
    first = tokens(cached)
    other = Tokenizer.train(Characters(), ["01 abcdefg", "z"])
    again, objective = find(cached, other)
    rows = listed(again.rows(objective, "train"))
    assert rows == listed(find(in_memory(cached), other)[0].rows(objective, "train"))
    (second,) = {path for path in first.parent.glob("tokens-*") if path.suffix != ".work"} - {first}
    # As if somebody had copied one folder over the other.
    shutil.rmtree(second)
    shutil.copytree(first, second)
    again, objective = find(cached, other)
    assert "it was made from something else; it is made anew" in caplog.text
    assert listed(again.rows(objective, "train")) == rows


def test_files_of_an_older_version_are_not_used(cached, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(examples, "_VERSION", examples._VERSION - 1)
        found, objective = find(cached)
        found.rows(objective, "train")
    again, _ = find(cached)
    assert not again._has_tokens
    assert len(list(cached.data_cache.folder.iterdir())) == 2


def test_c12_a_changed_file_of_the_same_size_and_time_is_noticed(cached, interrupted):
    interrupted(cached, 3)
    file = cached.task.target
    times = file.stat()
    content = file.read_text()
    file.write_text(content.replace("1", "2", 1))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    with pytest.raises(ValueError, match="the data changed since"):
        loop.prepare(cached)


def test_files_that_change_while_they_are_read_are_an_error(cached, monkeypatch):
    write = ParallelFiles.write

    def changed(task, folder):
        write(task, folder)
        task.source.write_text(task.source.read_text() + "more\n")

    monkeypatch.setattr(ParallelFiles, "write", changed)
    with pytest.raises(ValueError, match="the files of ParallelFiles changed while they were read"):
        find(cached)


def test_a_disk_that_fills_while_texts_are_read_is_told_and_given_back(cached, monkeypatch):
    def full(task, folder):
        (folder / "train.arrow").write_bytes(b"half of the texts")
        raise OSError(errno.ENOSPC, "Error writing bytes to file")  # as from pyarrow

    with monkeypatch.context() as patch:
        patch.setattr(ParallelFiles, "write", full)
        with pytest.raises(OSError, match=r"/texts: the texts cannot be written \(No space left.*--data-cache\.folder"):
            find(cached)
    assert not list(cached.data_cache.folder.rglob("*.arrow"))
    assert find(cached)[0].count == 81


def test_a_folder_that_cannot_hold_the_cache_is_told(cached, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"the texts cannot be written \(Not a directory\).*--data-cache\.folder"):
        find(dataclasses.replace(cached, data_cache=DataCache(tmp_path / "file", 0)))


def test_a_text_that_cannot_be_read_is_not_the_fault_of_the_cache(cached, monkeypatch):
    def fail(task, folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(task.source))

    monkeypatch.setattr(ParallelFiles, "write", fail)
    with pytest.raises(PermissionError, match=re.escape(str(cached.task.source))):
        find(cached)


def test_settings_that_do_not_fit_are_refused_before_anything_is_tokenized(cached, interrupted):
    interrupted(cached, 3)
    shutil.rmtree(cached.data_cache.folder)
    with pytest.raises(ValueError, match="other settings"):
        loop.prepare(dataclasses.replace(cached, label_smoothing=0.2))
    assert not cached.data_cache.folder.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": Optimizer(schedule=Cosine(warmup_steps=50)), "steps": 40}, r"warmup_steps \(50\)"),
        ({"parallel": Sharded(fsdp=3)}, r"fsdp \(3\) .* = 3 must divide the number of devices \(8\)"),
        ({"parallel": Sharded(sequence=2), "model": Seq2SeqConfig(FROM_TOKENIZER, 8, 8)}, r"sequence \(2\) splits"),
    ],
    ids=["schedule", "mesh", "model"],
)
def test_settings_that_need_no_text_are_refused_before_it_is_read(settings, said, cached):
    with pytest.raises(ValueError, match=said):
        loop.prepare(dataclasses.replace(cached, **settings))
    assert not cached.data_cache.folder.exists()


def test_who_waits_for_another_process_that_reads_is_told(cached, capsys, monkeypatch):
    find(cached)
    (folder,) = cached.data_cache.folder.glob("*/texts")
    (folder / "digests.json").unlink()
    acquire = CacheFolder.claim

    def claim(mine, name, *, wait=True):
        # Another process holds the lock when this one asks for it first.
        return acquire(mine, name, wait=wait) if wait or name != "texts" else contextlib.nullcontext(False)

    monkeypatch.setattr(CacheFolder, "claim", claim)
    found, _ = find(cached)
    assert found.count == 81
    assert f"{folder}: waiting for another process that reads the texts" in capsys.readouterr().out


def test_the_cache_may_be_elsewhere_when_a_run_goes_on(cached, interrupted, tmp_path):
    interrupted(cached, 3)
    session = loop.prepare(dataclasses.replace(cached, data_cache=DataCache(tmp_path / "other", 0)))
    session.checkpoints.close()
    assert session.training_examples == 81
    session = loop.prepare(in_memory(cached))
    session.checkpoints.close()
    assert session.training_examples == 81


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "memory"])
def test_a22_texts_beyond_the_learned_positions_are_counted(cache, cached):
    model = dataclasses.replace(cached.model, positions=Learned(9))
    experiment = dataclasses.replace(cached if cache else in_memory(cached), model=model)
    most = max(len(line) for line in LINES)
    beyond = rf"texts are longer than the learned positions.* {most + 1} tokens; raise --model\.positions\.max-length"
    with pytest.raises(ValueError, match=beyond):
        loop.prepare(experiment)


def test_every_task_of_files_names_them(cached, tmp_path):
    for task in (cached.task, lines(tmp_path), labelled(tmp_path)):
        assert all(file.is_file() for file in task.files())
        assert isinstance(task, ParallelFiles | OwnFiles)
    assert set(cached.task.files()) == {cached.task.source, cached.task.target}


def test_what_is_written_is_what_is_loaded(cached, tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.texts.PIECE", 7)
    monkeypatch.setattr(translation, "splits", None)  # no list of all pairs is made
    cached.task.write(tmp_path)
    monkeypatch.undo()
    for split, rows in cached.task.load().items():
        monkeypatch.setattr("train.data.texts.PIECE", 7)
        found = examples.Texts(tmp_path / f"{split}.arrow")
        assert list(found["source"]) == rows["source"][:]
        assert list(found["target"]) == rows["target"][:]
        monkeypatch.undo()
