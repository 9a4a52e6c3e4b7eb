"""Rows of metrics that survive a kill and a resumption."""

import json
import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from train.reports.metrics import MetricsFile, read_metrics

ROOT = Path(__file__).parents[3]


def test_d9_numbers_of_numpy_and_jax_come_back_as_python_values(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write({"step": np.int64(3), "loss": jnp.float32(0.5), "half": jnp.bfloat16(1.5), "done": np.bool_(True)})
        file.write({"step": 4, "kind": "Prüfung", "note": None})
    rows = read_metrics(path)
    assert rows == [{"step": 3, "loss": 0.5, "half": 1.5, "done": True}, {"step": 4, "kind": "Prüfung", "note": None}]
    assert [type(value) for value in rows[0].values()] == [int, float, float, bool]


def test_what_is_not_finite_stays_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write({"nan": jnp.nan, "up": np.float32(np.inf), "down": -math.inf})
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written == {"nan": "NaN", "up": "Infinity", "down": "-Infinity"}
    (row,) = read_metrics(path)
    assert math.isnan(row["nan"])
    assert (row["up"], row["down"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("value", [np.ones(2), [1, 2], {"a": 1}, object()])
def test_a_value_that_is_not_one_number_is_refused(tmp_path, value):
    with MetricsFile(tmp_path / "metrics.jsonl") as file, pytest.raises(TypeError, match="'loss' must be a number"):
        file.write({"loss": value})


def test_each_row_is_on_disk_at_once(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.write({"step": 1})
        assert read_metrics(file.path) == [{"step": 1}]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3}', b"\x00\x00", b'{"kind": "Pr\xc3'])
def test_e10_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    with MetricsFile(path) as file:
        file.write({"step": 4})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 4]


def test_a_file_with_nothing_but_a_torn_line_is_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"st')
    assert read_metrics(path) == []
    MetricsFile(path).close()
    assert path.read_bytes() == b""


def test_e10_resumed_run_has_no_duplicate_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for step in (10, 20, 30):
            file.write({"step": step, "loss": math.nan})
            file.write({"step": step, "kind": "validation"})
    with MetricsFile(path) as file:
        file.truncate_after(20)
        file.write({"step": 30, "loss": 1.0})
    assert [row["step"] for row in read_metrics(path)] == [10, 10, 20, 20, 30]
    assert math.isnan(read_metrics(path)[0]["loss"])
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff"])
def test_a_garbled_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 "):
        read_metrics(path)


def test_d6_a_full_disk_is_named_with_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.close()
        metrics._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with pytest.raises(OSError, match=r"metrics.jsonl: a row could not be written \(No space left on device\)"):
            metrics.write({"step": 1})


def test_rows_are_given_on_once_they_are_on_disk(tmp_path):
    given = []

    def also(row):
        given.append((row, read_metrics(tmp_path / "metrics")))

    with MetricsFile(tmp_path / "metrics", also=also) as file:
        file.write({"step": 1, "loss": float("nan")})
    ((row, (written,)),) = given
    assert row["step"] == written["step"] == 1
    assert np.isnan(row["loss"])
