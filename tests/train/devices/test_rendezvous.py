"""Processes meet before JAX connects them; what keeps them apart is told to all of them."""

import contextlib
import socket
import threading
import time

import pytest

from train.devices.rendezvous import meet


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def meeting(*guests, timeout=2.0, port=None):
    """What each process of a meeting is told; a process is (count, index), or its own function of the port."""
    port = free_port() if port is None else port
    told = [None] * len(guests)

    def attend(place, guest):
        try:
            told[place] = guest(port) if callable(guest) else meet("127.0.0.1", port, *guest, timeout=timeout)
        except (ValueError, OSError) as error:
            told[place] = error

    threads = [threading.Thread(target=attend, args=each) for each in enumerate(guests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_all_come_in_any_order():
    def late(port):
        time.sleep(0.3)
        meet("127.0.0.1", port, 3, 0, timeout=2.0)

    assert meeting((3, 2), late, (3, 1)) == [None, None, None]


def test_the_port_is_free_again_at_once():
    port = free_port()
    for _ in range(2):
        assert meeting((2, 0), (2, 1), port=port) == [None, None]


def test_a_stranger_disturbs_nobody():
    """Whoever scans ports says nothing, or something else."""

    def stranger(port):
        for line in (b"", b"GET / HTTP/1.1\r\n", b"\xff\n", b"seqattn 2 one\n"):
            time.sleep(0.1)
            with socket.create_connection(("127.0.0.1", port)) as other:
                other.sendall(line)

    def late(port):
        time.sleep(0.7)
        meet("127.0.0.1", port, 2, 1, timeout=2.0)

    assert meeting((2, 0), stranger, late) == [None, None, None]


def test_e14_nobody_at_the_address():
    (told,) = meeting((2, 1), timeout=0.3)
    assert isinstance(told, TimeoutError)
    assert "process 0 at 127.0.0.1:" in str(told)
    assert "did not let process 1 start" in str(told)
    assert "(Connection refused)" in str(told)


def test_e14_another_program_at_the_address():
    with socket.create_server(("", 0)) as other:

        def hang_up(_):
            other.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                while True:
                    other.accept()[0].close()

        told, _ = meeting((2, 1), hang_up, timeout=0.3, port=other.getsockname()[1])
    assert "(it closed the connection, as another program would)" in str(told)


def test_a_process_that_was_killed_may_come_anew():
    def killed(port):
        time.sleep(0.1)
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.sendall(b"seqattn 3 1\n")
            time.sleep(0.2)

    def late(port):
        time.sleep(0.5)
        meet("127.0.0.1", port, 3, 1, timeout=2.0)

    def last(port):
        time.sleep(0.6)
        meet("127.0.0.1", port, 3, 2, timeout=2.0)

    assert meeting((3, 0), killed, late, last) == [None] * 4


def test_e14_someone_does_not_come():
    told = meeting((4, 0), (4, 2), timeout=0.5)
    assert all("of 4 processes these did not arrive within 0.5 s: 1, 3" in str(error) for error in told)


def test_e14_the_port_is_taken():
    with socket.create_server(("", 0)) as other:
        (told,) = meeting((2, 0), port=other.getsockname()[1])
    assert "of process 0 is not free (Address already in use); stop the program that uses it" in str(told)


@pytest.mark.parametrize("index", [0, 1])
def test_e14_two_processes_of_one_index(index):
    def second(port):
        time.sleep(0.2)
        if index:
            return meet("127.0.0.1", port, 3, 1, timeout=2.0)
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.sendall(b"seqattn 3 0\n")
            raise ValueError(other.makefile().readline())

    told = meeting((3, 0), (3, 1), second)
    assert all(f"two processes have --processes.index {index}; give each of the 3" in str(error) for error in told)


def test_e14_processes_that_count_differently():
    told = meeting((2, 0), (3, 2))
    assert all("process 0 has --processes.count 2, and process 2 has 3" in str(error) for error in told)
