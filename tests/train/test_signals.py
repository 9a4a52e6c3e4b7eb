"""A first signal waits for the end of the step, a second does not."""

import os
import signal
import subprocess
import sys

import pytest

from train.signals import Interrupts


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
        "import os, signal; from train.signals import Interrupts\n"
        "with Interrupts():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('noted', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('still here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "noted\n"
    assert done.returncode == -signal.SIGTERM
