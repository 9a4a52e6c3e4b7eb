"""A run that is killed at random moments ends, bit by bit, as one that never was."""

import dataclasses
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

from train.config import decode
from train.engine import session
from train.reports.metrics import read_metrics

ROOT = Path(__file__).parents[2]
FLAGS = (
    "reverse --task.train-examples 101 --task.validation-examples 7 --task.test-examples 5 --task.min-length 2 "
    "--task.max-length 5 --model.num-encoder-layers 1 --model.num-decoder-layers 1 --model.block.model-dim 12 "
    "--model.block.hidden-dim 17 --model.block.num-heads 2 --model.block.dropout-rate 0.3 --batches.tokens 256 "
    "--batches.packed True --batches.max-length 16 --evaluate-every 20 --log-every 3 --ema 0.9 --keep-best 1 "
    "--optimizer.schedule.warmup-steps 50"
).split()
TIMED = ("tokens_per_second", "mfu", "data_wait", "padding", "save_seconds")
"""What a row of metrics says of the time since the row before it, or since the process began."""


def last_step(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return max((row["step"] for row in read_metrics(file)), default=0) if file.exists() else 0


def saving(folder: Path) -> set[Path]:
    """The checkpoints that are being written, or were by processes that were killed."""
    return set((folder / "checkpoints").glob(".saving-*"))


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of so many steps, which share what they compile."""

    steps: int
    cache: Path

    def start(self, folder: Path) -> subprocess.Popen[str]:
        """A process that trains, by the command that users have, on one CPU device."""
        variables = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(self.cache)}
        variables |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, "-m", "train", *FLAGS, "--steps", str(self.steps), "--run", str(folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=variables, **pipes)

    def finish(self, folder: Path) -> None:
        with self.start(folder) as process:
            shown, _ = process.communicate()
        assert process.returncode == 0, shown

    def kill(self, folder: Path, number: signal.Signals, steps: int, seconds: float | None) -> set[Path] | None:
        """Trains so many steps more, then some fraction of a second, or until it saves.

        What it was saving when it was killed; None where it came to its end before.
        """
        begun, before = last_step(folder), saving(folder)
        with self.start(folder) as process:
            while process.poll() is None and last_step(folder) < min(begun + steps, self.steps - 1):
                time.sleep(0.002)
            while seconds is None and process.poll() is None and not saving(folder) - before:
                time.sleep(0.0005)
            time.sleep(seconds or 0)
            process.send_signal(number)
            shown, _ = process.communicate()
        assert process.returncode in (0, -number, 128 + number), shown
        return saving(folder) - before if process.returncode else None


def leaves(folder: Path) -> list[np.ndarray]:
    """Every array of the latest checkpoint: parameters, optimizer, counts and the moving average."""
    made = session.prepare(decode(json.loads((folder / "config.json").read_text())))
    with made.checkpoints:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(made.state)]


@pytest.mark.parametrize(("kills", "steps"), [(3, 120), pytest.param(20, 1200, marks=pytest.mark.slow)])
def test_d1_d15_d16_a_run_that_is_killed_ends_as_one_that_is_not(kills, steps, tmp_path):
    """By SIGKILL at random moments and, one time in four, within a save, and by SIGTERM, which saves where it stops.

    A run that comes to its end before it was killed often enough is followed by another one.
    """
    runs, generator = Runs(steps, tmp_path / "cache"), random.Random(5)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.finish(whole)
    count = ended = 0
    while count < kills:
        number = signal.SIGTERM if count % 4 == 2 else signal.SIGKILL
        more, within_save = generator.randrange(1, 27), count % 4 == 1
        left = runs.kill(killed, number, more, None if within_save else generator.uniform(0, 0.1))
        count += bool(left) if within_save else left is not None
        if left is None or count == kills or last_step(killed) >= steps - 1:
            runs.finish(killed)
            assert_equal(whole, killed)
            ended += 1
            killed = tmp_path / f"killed-{ended}"


def assert_equal(whole: Path, killed: Path) -> None:
    """Two runs of the same command hold the same, but for times."""
    for before, after in zip(leaves(whole), leaves(killed), strict=True):
        np.testing.assert_array_equal(before, after)
    for name in ("metrics.jsonl", "samples.jsonl"):
        first, second = (
            [{key: value for key, value in row.items() if key not in TIMED} for row in read_metrics(folder / name)]
            for folder in (whole, killed)
        )
        assert first == second
        assert {row["step"] for row in first} >= {20, 40}
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, killed)]
    assert results[0] == results[1]
