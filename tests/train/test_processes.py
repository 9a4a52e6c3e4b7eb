"""The whole of training in two processes: one run folder, one curve, one end."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from train.log import read_metrics

ROOT = Path(__file__).parents[2]
PROGRAM = """
import dataclasses, sys
import jax

index, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2 // count)
from tests.train.conftest import TINY
from pathlib import Path
from train import environment, loop
from train.distributed import Processes

processes = Processes(f"127.0.0.1:{port}", count, index, timeout=60) if count > 1 else Processes()
settings = {"keep_checkpoints": 3, "average": 2, "beam_size": 2, "keep_best": 1}
experiment = dataclasses.replace(TINY, run=Path(folder), processes=processes, **settings)
environment.command(lambda: loop.train(experiment))
"""


def train(folder, count):
    """A run in so many processes, over two devices in all; what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    commands = [[sys.executable, "-c", PROGRAM, str(index), str(count), port, str(folder)] for index in range(count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for command in commands]
    try:
        shown = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(shown)
    return shown


@pytest.mark.slow
def test_c10_e2_two_processes_train_evaluate_save_and_end_as_one(tmp_path):
    train(tmp_path / "one", 1)
    first, second = train(tmp_path / "two", 2)
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
