"""The whole of training in two processes: one run folder, one curve, one end."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from train.checkpoints import lock, run
from train.reports.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PROGRAM = """
import dataclasses, json, sys
import jax

index, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2 // count)
from tests.train.conftest import TINY
from pathlib import Path
from train.data import tokenized
from train.data.cache_folder import DataCache
from train.engine import loop
from train.devices import environment
from train.tasks import ParallelFiles
from train.devices.parallel import Sharded
from train.devices.processes import Processes

processes = Processes(f"127.0.0.1:{port}", count, index, timeout=60) if count > 1 else Processes()
settings = json.loads(sys.argv[5])
if "parallel" in settings:
    settings["parallel"] = Sharded(**settings["parallel"])
if "texts" in settings:
    texts, tokenized.SHARD = Path(settings.pop("texts")), 32
    held_out = {"validation_examples": 5, "test_examples": 4}
    settings["task"] = ParallelFiles(source=texts / "source", target=texts / "target", **held_out)
    settings["data_cache"] = DataCache(Path(settings["cache"]), 0) if settings.pop("cached") else DataCache()
    del settings["cache"]
experiment = dataclasses.replace(TINY, run=Path(folder), processes=processes, **settings)
environment.command(lambda: loop.train(experiment))
"""


def start(folder, *settings):
    """A run over two devices in all, with a process for each of these settings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = [str(len(settings)), port, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    return [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(index), *common, json.dumps(given)], **pipes)
        for index, given in enumerate(settings)
    ]


def ended(processes, code=0):
    """What each of them printed until all ended, with this code."""
    try:
        shown = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(shown)
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, {"parallel": {"fsdp": 2}}], ids=["pmap", "mesh"])
def test_c10_two_processes_train_evaluate_save_and_end_as_one(parallel, tmp_path):
    """On a mesh, no process has the whole model at any time."""
    settings = {"keep_checkpoints": 3, "average": 2, "beam_size": 2, "keep_best": 1, **parallel}
    ended(start(tmp_path / "one", settings))
    first, second = ended(start(tmp_path / "two", settings, settings))
    assert "test exact match" in first
    assert "step" not in second  # it is the first one that tells
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0].keys() == results[1].keys()
    assert results[1]["average"] == 2
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)
    one, two = (
        [(row["step"], row["kind"], row["loss"]) for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("one", "two")
    )
    assert [row[:2] for row in one] == [row[:2] for row in two]
    assert [row[2] for row in two] == pytest.approx([row[2] for row in one], rel=1e-4)


@pytest.mark.slow
def test_two_processes_that_share_a_token_cache_train_as_in_memory(tmp_path):
    lines = [f"{number:b} {'ab' * (number % 4)}" for number in range(90)]
    for name, step in (("source", 1), ("target", -1)):
        (tmp_path / name).write_text("".join(f"{line[::step]}\n" for line in lines))
    settings = {"texts": str(tmp_path), "cache": str(tmp_path / "cache")}
    settings |= {"steps": 4, "evaluate_every": 4, "bleu": False}
    for name, cached in (("memory", False), ("cached", True)):
        given = settings | {"cached": cached}
        first, second = ended(start(tmp_path / name, given, given))
        # Only the first process tells that it tokenizes.
        assert (first.count("tokenizing 81 training examples"), second.count("tokenizing")) == (cached, 0)
    (folder,) = (path for path in (tmp_path / "cache").glob("*/tokens-*") if path.suffix != ".work")
    assert len(list(folder.glob("0*.arrow"))) == 3
    memory, cached = (jax.tree.leaves(run.load(tmp_path / name).model) for name in ("memory", "cached"))
    for before, after in zip(memory, cached, strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.slow
def test_e2_a_signal_to_one_of_two_processes_saves_the_same_step_of_both_and_the_run_goes_on(tmp_path):
    settings = {"steps": 151, "evaluate_every": 50, "log_every": 1}
    ended(start(tmp_path / "whole", settings, settings))
    stopped, metrics = tmp_path / "stopped", tmp_path / "stopped" / "metrics.jsonl"
    processes = start(stopped, settings, settings)
    until = time.monotonic() + 240
    while time.monotonic() < until and not (metrics.exists() and b'"step": 20,' in metrics.read_bytes()):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    first, _ = ended(processes, 128 + signal.SIGTERM)
    assert "stopped by" in first
    (step,) = (int(path.name) for path in (stopped / "checkpoints").iterdir() if int(path.name) % 50)
    assert 20 <= step < 151
    first, _ = ended(start(stopped, settings, settings))
    assert f"resuming after {step} updates" in first
    one, two = (jax.tree.leaves(run.load(tmp_path / name).model) for name in ("whole", "stopped"))
    for before, after in zip(one, two, strict=True):
        np.testing.assert_array_equal(before, after)
    one, two = (
        [(row["step"], row["kind"], row["loss"]) for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "stopped")
    )
    assert one == two


@pytest.mark.slow
def test_processes_that_were_given_other_settings_are_all_refused(tmp_path):
    for other in ({"label_smoothing": 0.2}, {"steps": 13, "start_from": str(tmp_path)}):
        for text in ended(start(tmp_path / "run", {}, other), 2):
            assert "the processes differ in settings; give all of them the same" in text
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_where_process_0_is_refused_the_others_do_not_wait(tmp_path):
    with lock.RunLock(tmp_path / "run"):
        first, second = ended(start(tmp_path / "run", {}, {}), 2)
    assert "is being trained" in first
    assert "another process cannot train in" in second
