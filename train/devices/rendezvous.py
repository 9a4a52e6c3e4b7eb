"""Where the processes of a training meet before JAX connects them.

Where process 0 does not answer, or another process does not come, JAX ends all of them by SIGABRT with a trace of C++
that does not say who is missing. Where processes count differently, or two have the same index, some of them train on
or wait until then (measured with jax 0.10.2). So they meet first, at the same port, where each case is one sentence.
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
"""Seconds that whoever connects to process 0 has to say who it is."""
_LINE = 4096
"""Bytes of a message, at most."""


def meet(host: str, port: int, count: int, index: int, *, timeout: float) -> None:
    """Returns once all processes are there and agree on how many they are; process 0 listens at the port.

    Args:
        host: of process 0.
        port: there.
        count: how many processes.
        index: which one this is.
        timeout: seconds to wait.

    Raises:
        ValueError: two processes have the same index, or count differently.
        TimeoutError: process 0 or some other did not come.
        OSError: the port is not free.
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
            f"port {port} of process 0 is not free ({os.strerror(error.errno or 0)}); end what uses it, or give all "
            "processes another --processes.coordinator"
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
            verdict = TimeoutError(f"of {count} processes these did not come within {timeout:g} s: {absent}")
        except ValueError as error:
            verdict = error
        for guest in guests.values():
            with guest:
                _tell(guest, _GO if verdict is None else str(verdict))
    if verdict is not None:
        raise verdict


def _admit(guest: socket.socket, guests: dict[int, socket.socket], count: int) -> None:
    """Adds a process to those that came; whoever says nothing of the kind is sent away.

    Raises:
        ValueError: it says what cannot be.
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
                # A little longer than process 0, which knows who is missing.
                process_0.settimeout(left + _ANSWER)
                _tell(process_0, f"{_HELLO} {count} {index}")
                answer = _heard(process_0)
            if answer == _GO:
                return
            if answer:
                raise ValueError(answer)
            reason = "it hung up, as another program would" if answer == "" else "it waits, as if for others"
        except OSError as error:
            reason = error.strerror or error
        time.sleep(_RETRY)
    raise TimeoutError(
        f"process 0 does not let process {index} begin at {host}:{port} within {timeout:g} s ({reason}); start all "
        "processes, and give them the same --processes.coordinator"
    )


def _tell(other: socket.socket, line: str) -> None:
    # Who is gone meanwhile will not hear, and JAX will miss it.
    with contextlib.suppress(OSError):
        other.sendall(f"{line}\n".encode())


def _heard(other: socket.socket) -> str | None:
    """A line; "" from one who hangs up or sends something else, None from one who stays silent."""
    try:
        with other.makefile("rb") as file:
            return file.readline(_LINE).decode().strip()
    except TimeoutError:
        return None
    except (OSError, UnicodeDecodeError):
        return ""


def _is_there(other: socket.socket | None) -> bool:
    """Whether one who has nothing more to say still listens; a process that was killed does not, and may come anew."""
    if other is None:
        return False
    other.setblocking(False)
    try:
        return other.recv(1) != b""
    except OSError as error:
        return isinstance(error, BlockingIOError)
