"""The script for a Hopper GPU, as far as a CPU can run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench.record import CHECKED, TIMED, read
from benchmarks.compile.execution import AGREES

ROOT = Path(__file__).parents[2]


def run(*words, **variables):
    command = [ROOT / "benchmarks" / "on_gpu.sh", *map(str, words)]
    env = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=False)


def outcomes(folder):
    return {row["step"]: row for row in map(json.loads, (folder / "cpu-steps.jsonl").read_text("utf-8").splitlines())}


@pytest.fixture
def here(monkeypatch):
    # Other tests have set these for 8 devices and their own cache.
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@pytest.mark.slow
def test_a_dry_run_does_every_step(here, tmp_path):
    done = run("--dry-run", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = outcomes(tmp_path)
    assert {name: row["status"] for name, row in found.items()} == {
        "tests": "passed",
        "racecheck": "skipped",
        "memcheck": "skipped",
        "checks": "passed",
        "cpu": "passed",
        "table": "passed",
        "picture": "passed",
        "profile": "passed",
        "compiled": "passed",
    }
    assert " passed" in found["tests"]["reason"]
    assert all(row["platform"] == "cpu" and row["seconds"] <= row["limit_seconds"] for row in found.values())
    rows = read(tmp_path / "cpu.jsonl")
    timed = {(row["mask"], row["pass"]) for row in rows if row["status"] == TIMED}
    assert timed == {(mask, direction) for mask in ("causal", "cap") for direction in ("fwd", "bwd")}
    # Peers and kernels that this machine lacks are there with their reasons.
    assert all(row["reason"] for row in rows if row["status"] != TIMED)
    assert {"seqattn:hopper", "tokamax", "torch:flex", "torch:flash-3"} <= {row["implementation"] for row in rows}
    assert CHECKED in {row["status"] for row in read(tmp_path / "cpu-checked.jsonl")}
    assert {row["status"] for row in read(tmp_path / "cpu-compiled.jsonl")} == {AGREES}
    assert sum(row["share"] for row in read(tmp_path / "cpu-profile.jsonl")) == pytest.approx(1)
    assert all((tmp_path / f"cpu.{suffix}").stat().st_size > 1000 for suffix in ("png", "svg"))


@pytest.mark.slow
def test_a_step_that_fails_is_recorded_and_the_next_one_runs(here, tmp_path):
    # There are no rows to draw and to profile.
    done = run("--dry-run", "--steps", "picture,profile,racecheck", "--out", tmp_path)
    assert done.returncode == 1
    found = outcomes(tmp_path)
    assert [found[name]["status"] for name in ("racecheck", "picture", "profile")] == ["skipped", "failed", "failed"]
    assert "No such file" in found["profile"]["reason"]
    assert found["profile"]["reason"].startswith("exit status 2")


@pytest.mark.parametrize(
    ("words", "reason"), [(["--steps", "tabel"], "no step 'tabel': give tests racecheck"), (["--fast"], "--dry-run")]
)
def test_what_does_not_exist_is_refused(words, reason):
    done = run(*words)
    assert done.returncode == 2
    assert reason in done.stderr
    assert not done.stdout


@pytest.mark.slow
def test_without_a_gpu_only_a_dry_run_is_possible(here, tmp_path):
    done = run("--out", tmp_path)
    assert done.returncode == 2
    assert "jax sees no GPU" in done.stderr
    assert not list(tmp_path.iterdir())
