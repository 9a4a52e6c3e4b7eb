"""A run that is killed at random moments ends, bit by bit, as one that never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from train import session
from train.config import decode
from train.log import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 300
FLAGS = (
    "reverse --task.train-examples 101 --task.validation-examples 7 --task.test-examples 5 --task.min-length 2 "
    "--task.max-length 5 --model.num-encoder-layers 1 --model.num-decoder-layers 1 --model.block.model-dim 12 "
    "--model.block.hidden-dim 17 --model.block.num-heads 2 --model.block.dropout-rate 0.3 --batches.tokens 256 "
    f"--batches.packed True --batches.max-length 16 --steps {STEPS} --evaluate-every 20 --log-every 3 "
    "--ema 0.9 --keep-best 1"
).split()
TIMED = ("tokens_per_second", "mfu", "data_wait", "padding")
"""What a row of metrics says of the time since the row before it, or since the process began."""


def start(folder: Path, cache: Path) -> subprocess.Popen[str]:
    """A process that trains, by the command that users have, on one CPU device."""
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    variables |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "train", *FLAGS, "--run", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=variables, **pipes)


def finish(folder: Path, cache: Path) -> None:
    with start(folder, cache) as process:
        shown, _ = process.communicate()
    assert process.returncode == 0, shown


def last_step(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return max((row["step"] for row in read_metrics(file)), default=0) if file.exists() else 0


def kill(folder: Path, cache: Path, number: signal.Signals, steps: int, seconds: float) -> int:
    """Trains so many steps more, and then some fraction of a second; the exit code of the killed process."""
    begun = last_step(folder)
    with start(folder, cache) as process:
        while process.poll() is None and last_step(folder) < min(begun + steps, STEPS - 1):
            time.sleep(0.002)
        time.sleep(seconds)
        process.send_signal(number)
        process.communicate()
    return process.returncode


def leaves(folder: Path) -> list[np.ndarray]:
    """Every array of the latest checkpoint: parameters, optimizer, counts and the moving average."""
    made = session.prepare(decode(json.loads((folder / "config.json").read_text())))
    with made.checkpoints:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(made.state)]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_d1_d15_d16_a_run_that_is_killed_ends_as_one_that_is_not(kills, tmp_path):
    """By SIGKILL at random moments, of which many fall into saves, and by SIGTERM, which saves where it stops."""
    generator, cache, codes = random.Random(5), tmp_path / "cache", []
    finish(tmp_path / "whole", cache)
    for count in range(kills):
        number = signal.SIGTERM if count % 4 == 2 else signal.SIGKILL
        steps = generator.randrange(1, 2 * STEPS // (kills + 2))
        codes.append((number, kill(tmp_path / "killed", cache, number, steps, generator.uniform(0, 0.2))))
    assert sum(code in (-number, 128 + number) for number, code in codes) > kills / 2, codes
    finish(tmp_path / "killed", cache)
    whole, killed = leaves(tmp_path / "whole"), leaves(tmp_path / "killed")
    for before, after in zip(whole, killed, strict=True):
        np.testing.assert_array_equal(before, after)
    for name in ("metrics.jsonl", "samples.jsonl"):
        first, second = (
            [{key: value for key, value in row.items() if key not in TIMED} for row in read_metrics(folder / name)]
            for folder in (tmp_path / "whole", tmp_path / "killed")
        )
        assert len(first) > STEPS / 20
        assert first == second
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")]
    assert results[0] == results[1]
