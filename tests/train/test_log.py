"""Rows of metrics that survive a kill and a resumption, and progress that any terminal can show."""

import io
import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from train.log import MetricsFile, Progress, read_metrics

ROOT = Path(__file__).parents[2]


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


class Clock:
    """Seconds that pass only when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


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


def plain_lines(total, updates, **options):
    """The lines that updates, as (seconds later, step, metrics), leave off a terminal."""
    clock, stream = Clock(), io.StringIO()
    with Progress(total, stream=stream, clock=clock, **options) as progress:
        for seconds, step, metrics in updates:
            clock.now += seconds
            progress.update(step, **metrics)
    return stream.getvalue().splitlines()


def test_plain_lines_show_metrics_until_they_are_given_anew():
    metrics = {"loss": 2.5, "tokens_per_second": 12345.6}
    lines = plain_lines(100, [(0, 1, metrics), (60, 2, {"loss": 1.25})])
    assert lines == [
        "step 1/100  loss 2.5  12,346 tokens/s  ETA -",
        "step 2/100  loss 1.25  12,346 tokens/s  ETA 1:38:00",
    ]


def test_plain_lines_come_at_most_every_so_many_seconds_and_at_the_end():
    lines = plain_lines(9, [(1, step, {}) for step in range(1, 10)], seconds=3)
    assert [line.split()[1] for line in lines] == ["1/9", "4/9", "7/9", "9/9"]


def test_remaining_time_counts_this_session_only_and_not_the_first_compilation():
    lines = plain_lines(1000, [(500, 901, {}), (20, 911, {})], initial_step=900)
    assert [line.split("  ")[-1] for line in lines] == ["ETA -", "ETA 0:02:58"]


def test_messages_keep_their_brackets_and_escape_what_the_stream_lacks():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with Progress(1, stream=stream) as progress:
        progress.print("[EOS] 5 янв [/] :smile:")
    assert raw.getvalue().decode() == "[EOS] 5 \\u044f\\u043d\\u0432 [/] :smile:\n"


PROGRAM = r"""
from train.log import Progress
with Progress(3, initial_step=1) as progress:
    progress.update(2, loss=0.5, tokens_per_second=1000.0)
    progress.print("[EOS] 5 \u044f\u043d\u0432 [/]")
    progress.update(3, loss=0.25)
"""


def on_terminal(**environment):
    """What a terminal receives from a program whose environment has these variables."""
    leader, follower = pty.openpty()
    variables = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | environment
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, cwd=ROOT, env=variables) as process:
        os.close(follower)
        shown = b"".join(iter(lambda: _read(leader), b""))
        errors = process.stderr.read().decode()
    os.close(leader)
    assert process.returncode == 0, errors
    return shown.decode()


def _read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that nobody writes to a terminal any more
        return b""


def test_terminal_shows_a_bar_with_loss_rate_and_remaining_time():
    shown = on_terminal(TERM="xterm", COLUMNS="90", PYTHONUTF8="1")
    for part in ("3/3", "━", "loss 0.25", "1,000 tokens/s", "ETA 0:00:00", "[EOS] 5 янв [/]"):
        assert part in shown


@pytest.mark.parametrize("columns", ["0", "1", "7", "nonsense"])
def test_e11_tiny_terminal_does_not_crash(columns):
    assert on_terminal(TERM="xterm", COLUMNS=columns, PYTHONUTF8="1")


@pytest.mark.parametrize(("terminal", "columns"), [("xterm", "90"), ("xterm", "20"), ("dumb", "90")])
def test_e11_ascii_terminal_gets_ascii(terminal, columns):
    shown = on_terminal(TERM=terminal, COLUMNS=columns, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert shown.isascii()
    assert "\\u044f" in shown
    assert "loss 0.25" in shown
    assert ("step 2/3" in shown) == (terminal == "dumb")
