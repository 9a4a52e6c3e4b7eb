"""A first signal waits for the end of the step, a second does not."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from train.engine.signals import Interrupts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_handlers_come_back(number, code):
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        assert interrupts.received is None
        os.kill(os.getpid(), number)
        assert interrupts.received == number
        assert interrupts.exit_code() == code
    assert signal.getsignal(number) == before


def test_e1_a_second_signal_ends_the_process():
    script = (
        "import os, signal, time; from train.engine.signals import Interrupts\n"
        "with Interrupts():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.7); print('noted', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60); print('still here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "noted\n"
    assert "once more quits at once" in done.stderr
    assert done.returncode == 128 + signal.SIGINT


def test_e1_signals_are_answered_while_python_waits_for_another_language():
    # A digest that takes hours runs in C, as compilations do in C++: no handler of Python runs until it ends.
    script = (
        "import hashlib; from train.engine.signals import Interrupts\n"
        "with Interrupts():\n"
        "    print('working', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        limit = threading.Timer(60, process.kill)  # what is not answered must not hang the tests
        limit.start()
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline() == "stopping after this step; once more quits at once\n"
        assert process.poll() is None
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
        limit.cancel()


def test_e1_a_second_signal_counts_where_nobody_reads_what_is_said():
    script = (
        "import os, signal, time; from train.engine.signals import Interrupts\n"
        "os.close(2)\n"
        "with Interrupts():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.7)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 128 + signal.SIGTERM


def test_who_was_woken_before_is_again():
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    try:
        with Interrupts():
            pass
        assert signal.set_wakeup_fd(before) == write
    finally:
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)
