"""The progress bar on a terminal, and plain lines elsewhere."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from train.reports.progress import Progress

ROOT = Path(__file__).parents[3]


class Clock:
    """Seconds that pass only when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


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


def test_plain_lines_say_what_is_counted():
    assert plain_lines(7, [(0, 7, {})], what="tokenized") == ["tokenized 7/7  ETA 0:00:00"]


def test_plain_lines_come_at_most_every_so_many_seconds_and_at_the_end():
    lines = plain_lines(9, [(1, step, {}) for step in range(1, 10)], seconds=3)
    assert [line.split()[1] for line in lines] == ["1/9", "4/9", "7/9", "9/9"]


def test_remaining_time_counts_this_session_only_and_not_the_first_compilation():
    lines = plain_lines(1000, [(500, 901, {}), (20, 911, {})], initial_step=900)
    assert [line.split("  ")[-1] for line in lines] == ["ETA -", "ETA 0:02:58"]


def test_remaining_time_is_that_of_the_latest_steps():
    updates = [(9, step, {}) for step in range(1, 1002)] + [(1, step, {}) for step in range(1002, 2002)]
    assert plain_lines(3001, updates)[-1].split("  ")[-1] == "ETA 0:16:40"


def test_messages_keep_their_brackets_and_escape_what_the_stream_lacks():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with Progress(1, stream=stream) as progress:
        progress.print("[EOS] 5 янв [/] :smile:")
    assert raw.getvalue().decode() == "[EOS] 5 \\u044f\\u043d\\u0432 [/] :smile:\n"


PROGRAM = r"""
from train.reports.progress import Progress
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
    shown = re.sub(r"\x1b\[\d+m", "", on_terminal(TERM="xterm", COLUMNS="90", PYTHONUTF8="1"))  # without colours
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
