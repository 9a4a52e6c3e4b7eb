"""Compiles in a child process for each target, which may crash or take too long without harm."""

import contextlib
import json
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from benchmarks.compile.collectives import warnings
from benchmarks.compile.targets import ROOT, Target

_START_SECONDS = 120


class Child:
    """A process that compiles one program after another; a new one is started where the last one ended.

    Args:
        target: what it compiles for.
        limit: if given, the time limit of a program in seconds, in place of the program's own.
    """

    def __init__(self, target: Target, limit: int | None = None) -> None:
        self._target, self._limit = target, limit
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in `__exit__`)
        self.hello: dict[str, Any] = {}
        """The device and the versions, once a process has started."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()
        self._errors.close()

    def compile(self, name: str, seconds: int) -> dict[str, Any]:
        """Compiles a program. A crash and a lack of time are answers, too."""
        limit = self._limit or seconds
        with _reason() as answer:
            process = self._running()
            assert process.stdin is not None
            self._errors.seek(0)
            self._errors.truncate()
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            answer |= self._read(process, limit)
            answer["warnings"] = warnings(self._printed())
        if answer["status"] in ("crashed", "too slow"):
            self._end()
        return answer

    def _running(self) -> "subprocess.Popen[str]":
        """Returns the process, and starts it if there is none."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        command = [str(self._target.environment / "bin" / "python"), "-m", "benchmarks.compile.worker"]
        self._process = subprocess.Popen(
            [*command, self._target.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=self._target.variables(),
            cwd=ROOT,
        )
        self.hello = self._read(self._process, _START_SECONDS)
        return self._process

    def _read(self, process: "subprocess.Popen[str]", seconds: float) -> dict[str, Any]:
        """Returns the next answer. Raises TimeoutError, and RuntimeError if the process ends instead."""
        assert process.stdout is not None
        begun = time.monotonic()
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        if not ready:
            raise TimeoutError(f"did not finish in {time.monotonic() - begun:.0f} s")
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            raise RuntimeError(f"the compiler's process {how}: {_last(self._printed())}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _printed(self) -> str:
        self._errors.flush()
        self._errors.seek(0)
        return self._errors.read()

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process = None


@contextlib.contextmanager
def _reason() -> Iterator[dict[str, Any]]:
    """Yields an answer, which tells why there is none if the process ends or takes too long."""
    answer: dict[str, Any] = {}
    try:
        yield answer
    except TimeoutError as error:
        answer |= {"status": "too slow", "reason": str(error)}
    except (RuntimeError, BrokenPipeError) as error:
        answer |= {"status": "crashed", "reason": str(error)}


def _last(printed: str) -> str:
    """Returns the line that tells most about a crash: the first fatal one, else the last one."""
    lines = [" ".join(line.split()) for line in printed.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("F") and "] " in line]
    return (fatal[:1] or lines[-1:] or ["no message"])[0]
