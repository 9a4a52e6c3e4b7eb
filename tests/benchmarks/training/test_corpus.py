"""The corpus of the benchmark, and what is read from a process that trains on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench.record import read
from benchmarks.training import corpus
from benchmarks.training.corpus import CorpusArguments, main, write_corpus


def test_a_corpus_has_so_many_pairs_and_is_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK", 7)
    (tmp_path / "again").mkdir()
    files = write_corpus(tmp_path, 23)
    sources, targets = ([line.split() for line in file.read_text().splitlines()] for file in files)
    assert len(sources) == len(targets) == 23
    assert [source[::-1] for source in sources] == targets
    assert {len(source) for source in sources} <= set(range(3, 13))
    assert [file.read_bytes() for file in write_corpus(tmp_path / "again", 23)] == [file.read_bytes() for file in files]


def test_the_memory_of_a_process_is_read_in_bytes():
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    memory = corpus._memory(os.getpid())
    assert memory["VmHWM"] >= memory["RssAnon"] > 10_000_000


def test_too_few_pairs_to_hold_some_out_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pairs"):
        CorpusArguments(tmp_path, pairs=2_000)


def test_a_folder_with_a_run_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="holds a run, so the first process would not begin anew"):
        next(corpus.measure(CorpusArguments(tmp_path, pairs=10_000)))


@pytest.mark.parametrize(("kept", "written"), [(10_000, 0), (7, 1)], ids=["whole", "interrupted"])
def test_only_a_whole_corpus_is_used_again(kept, written, tmp_path, monkeypatch):
    write_corpus(tmp_path, kept)
    calls = []
    monkeypatch.setattr(corpus, "write_corpus", lambda *given: calls.append(given))
    monkeypatch.setattr(corpus, "train", lambda *given: given)
    next(corpus.measure(CorpusArguments(tmp_path, pairs=10_000)))
    assert len(calls) == written


def test_a_process_that_dies_is_not_waited_for(tmp_path):
    (tmp_path / "metrics").write_text('{"kind": "train"}\n{"kind": "tr')
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"], text=True) as child:
        child.wait()
        with pytest.raises(RuntimeError, match="ended with code 7 before update 2"):
            corpus._wait(tmp_path / "metrics", 2, child)


@pytest.mark.slow
def test_three_processes_train_and_only_the_first_tokenizes(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_UPDATES", 3)
    main(CorpusArguments(tmp_path / "corpus", pairs=10_000, json=tmp_path / "rows.jsonl"))
    rows = read(tmp_path / "rows.jsonl")
    assert [row["process"] for row in rows] == ["first", "resumed, cold", "resumed, warm"]
    assert [row["tokenize_seconds"] > 0 for row in rows] == [True, False, False]
    assert [row["updates"] for row in rows] == sorted(row["updates"] for row in rows)
    assert all(0 < row["ready_seconds"] < row["first_update_seconds"] for row in rows)
