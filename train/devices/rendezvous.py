"""A rendezvous of the training processes before JAX connects them, for clear error messages.

If process 0 does not answer or another process is missing, JAX aborts all processes with a C++ trace that does not name
the missing one. If processes disagree about their number, or two have the same index, some of them train alone or wait
for the timeout (measured with jax 0.10.2). So the processes first meet at the same port, where each of these cases is
an error of one sentence.
"""

import contextlib
import os
import socket
import time

_HELLO = "seqattn"
_GO = "go"
_RETRY = 0.1
"""Seconds between two attempts to reach process 0."""
_ANSWER = 2.0
"""Seconds that a new connection to process 0 has to identify itself."""
_LINE = 4096
"""Maximum length of a message in bytes."""


def meet(host: str, port: int, count: int, index: int, *, timeout: float) -> None:
    """Waits until all processes have arrived and agree on their number. Process 0 listens at the port.

    Args:
        host: the host of process 0.
        port: the port on that host.
        count: the number of processes.
        index: the index of this process, from 0.
        timeout: seconds to wait.

    Raises:
        ValueError: two processes have the same index or different counts.
        TimeoutError: process 0 or another process did not arrive in time.
        OSError: the port is in use.
    """
    deadline = time.monotonic() + timeout
    if index == 0:
        _host_meeting(port, count, deadline, timeout)
    else:
        _join_meeting(host, port, count, index, deadline, timeout)


def _host_meeting(port: int, count: int, deadline: float, timeout: float) -> None:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=count)
    except OSError as error:
        raise OSError(
            f"port {port} of process 0 is not free ({os.strerror(error.errno or 0)}); stop the program that uses it, "
            "or give all processes another --processes.coordinator"
        ) from error
    guests: dict[int, socket.socket] = {}
    verdict: Exception | None = None
    with server:
        try:
            while sum(map(_is_there, guests.values())) < count - 1:
                server.settimeout(max(deadline - time.monotonic(), 1e-3))
                guest, _ = server.accept()
                _admit(guest, guests, count)
        except TimeoutError:
            absent = ", ".join(str(index) for index in range(1, count) if not _is_there(guests.get(index)))
            verdict = TimeoutError(f"of {count} processes these did not arrive within {timeout:g} s: {absent}")
        except ValueError as error:
            verdict = error
        for guest in guests.values():
            with guest:
                _tell(guest, _GO if verdict is None else str(verdict))
    if verdict is not None:
        raise verdict


def _admit(guest: socket.socket, guests: dict[int, socket.socket], count: int) -> None:
    """Admits a process that identifies itself; closes other connections.

    Raises:
        ValueError: the process has another count, or an index that is taken.
    """
    guest.settimeout(_ANSWER)
    words = (_heard(guest) or "").split()
    if len(words) != 3 or words[0] != _HELLO or not all(word.isdecimal() for word in words[1:]):
        guest.close()
        return
    theirs, index = int(words[1]), int(words[2])
    wrong = None
    if theirs != count:
        wrong = f"process 0 has --processes.count {count}, and process {index} has {theirs}"
    elif index == 0 or _is_there(guests.get(index)):
        wrong = f"two processes have --processes.index {index}; give each of the {count} its own"
    if wrong is not None:
        with guest:
            _tell(guest, wrong)
        raise ValueError(wrong)
    if index in guests:
        guests[index].close()
    guests[index] = guest


def _join_meeting(host: str, port: int, count: int, index: int, deadline: float, timeout: float) -> None:
    reason: object = "nothing listens there"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as process_0:
                # A little longer than process 0 waits, since only process 0 can name the missing ones.
                process_0.settimeout(left + _ANSWER)
                _tell(process_0, f"{_HELLO} {count} {index}")
                answer = _heard(process_0)
            if answer == _GO:
                return
            if answer:
                raise ValueError(answer)
            reason = "it closed the connection, as another program would" if answer == "" else "it waits for others"
        except OSError as error:
            reason = error.strerror or error
        time.sleep(_RETRY)
    raise TimeoutError(
        f"process 0 at {host}:{port} did not let process {index} start within {timeout:g} s ({reason}); start all "
        "processes, and give them the same --processes.coordinator"
    )


def _tell(other: socket.socket, line: str) -> None:
    # If the other process has ended meanwhile, JAX will notice that it is missing.
    with contextlib.suppress(OSError):
        other.sendall(f"{line}\n".encode())


def _heard(other: socket.socket) -> str | None:
    """Receives a line; "" if the other side closes the connection or sends no text, None if it stays silent."""
    try:
        with other.makefile("rb") as file:
            return file.readline(_LINE).decode().strip()
    except TimeoutError:
        return None
    except (OSError, UnicodeDecodeError):
        return ""


def _is_there(other: socket.socket | None) -> bool:
    """Whether a waiting process is still connected. A killed process is not, and may be started again."""
    if other is None:
        return False
    other.setblocking(False)
    try:
        return other.recv(1) != b""
    except OSError as error:
        return isinstance(error, BlockingIOError)
