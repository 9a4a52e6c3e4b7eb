"""Profiles of updates: a trace for TensorBoard or Perfetto, and a summary of where the time went."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData, ProfileOptions, StepTraceAnnotation, TraceAnnotation

_STEP, _WAIT, _START = "update", "wait for the batch", "start the update"
_PROGRAM = "ThunkExecutor::Execute (wait for completion)"
"""The event of XLA's CPU client for the run of a whole program. It covers time that no operation in the trace covers,
such as library calls and thread switches."""
_KINDS = 8

Span = tuple[float, float]
"""Start and end, in nanoseconds."""


@dataclass(frozen=True)
class Summary:
    """A summary of where the time of some updates went.

    Attributes:
        updates: number of updates.
        seconds: seconds from the start of the first update to the end of the last.
        computing: share of that time in which an operation ran on the devices of this process, including operations
            that wait for other devices; on CPU devices also the run of a program. The rest is overhead of loop or XLA.
        waiting: share of that time in which the loop waited for batches.
        starting: share of that time in which the loop started updates, while devices compute. With several CPU devices
            it includes the wait for updates.
        kinds: kinds of operations with their shares of the time of all operations, largest first.
    """

    updates: int
    seconds: float
    computing: float
    waiting: float
    starting: float
    kinds: tuple[tuple[str, float], ...]

    def lines(self) -> list[str]:
        """The summary as readable lines."""
        kinds = ", ".join(f"{name} {share:.1%}" for name, share in self.kinds[:_KINDS])
        return [
            f"{self.updates} updates of {1e3 * self.seconds / self.updates:,.1f} ms: devices computed "
            f"{self.computing:.1%} of the time; the loop waited for batches {self.waiting:.1%} and started updates "
            f"{self.starting:.1%} of it",
            f"operations by time: {kinds}",
        ]


class Profile:
    """Traces a range of updates of a run.

    Args:
        steps: "20:25" for updates 20 to 25; None for no trace. The first update of this process is never traced, since
            it compiles.
        folder: the folder for the trace. TensorBoard shows it, and https://ui.perfetto.dev its `.trace.json.gz`.
        say: a function that is called with each line of output.
    """

    def __init__(self, steps: str | None, folder: Path, say: Callable[[str], None]) -> None:
        self._steps = steps
        self._first, self._last = (0, 0) if steps is None else parse_steps(steps)
        self._folder, self._say = folder, say
        self._compiled, self._open = False, False
        self._traced: list[int] = []

    @contextmanager
    def step(self, step: int, state: Any) -> Iterator[Callable[[Any], Any]]:
        """A context for one update.

        Args:
            step: the number of the update.
            state: the state before it.

        Yields:
            A function to call with the new state. It waits for the state if the trace ends with this update.
        """
        wanted, self._compiled = self._compiled and self._first <= step <= self._last, True
        if wanted and not self._traced:
            jax.block_until_ready(state)  # earlier updates must not run into the trace
            self._attempt(self._begin)
        if not self._open:
            yield lambda result: result
            return
        self._traced.append(step)
        with StepTraceAnnotation(_STEP, step_num=step):
            yield jax.block_until_ready if step == self._last else lambda result: result
        if step == self._last:
            self.close()

    def close(self) -> None:
        """Ends a running trace, even if the run stops before the last traced update, and reports the summary."""
        if self._open:
            self._open = False
            self._attempt(self._end)
        elif self._steps is not None and not self._traced:
            self._say(f"none of the updates {self._steps} was traced: this session did not make them")

    def _begin(self) -> None:
        options = ProfileOptions()
        options.python_tracer_level = 0  # tracing every Python call would slow down the loop
        (self._folder / "plugins" / "profile").mkdir(parents=True, exist_ok=True)  # the profiler writes there
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._open = True

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self._say(f"trace of updates {self._traced[0]} to {self._traced[-1]} in {self._folder}")
        for line in summary(newest(self._folder)).lines():
            self._say(line)

    def _attempt(self, act: Callable[[], None]) -> None:
        """Starts or ends a trace. If that fails, reports the error and training continues without a trace."""
        try:
            act()
        except Exception as error:  # a disk error or an XLA error
            self._say(f"updates {self._steps} are not traced: {type(error).__name__}: {error}")
            self._steps, self._first, self._last = None, 0, 0

    waiting = staticmethod(lambda: TraceAnnotation(_WAIT))
    """A context that marks waiting for a batch in the trace."""
    starting = staticmethod(lambda: TraceAnnotation(_START))
    """A context that marks the start of an update in the trace."""


def parse_steps(steps: str) -> tuple[int, int]:
    """Parses a range of updates such as "20:25" to its first and last update, counted from 1.

    Raises:
        ValueError: the text has another form, or the last update is before the first.

    >>> parse_steps("20:25")
    (20, 25)
    """
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", steps)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"profile ({steps}) must be the numbers of the first and the last update, such as 20:25")
    return first, last


def newest(folder: Path) -> ProfileData:
    """Loads the latest trace in a folder of `jax.profiler`.

    Raises:
        ValueError: the folder holds no trace.
    """
    return ProfileData.from_file(str(max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)))


def summary(trace: ProfileData) -> Summary:
    """Summarizes a trace of updates."""
    whole: dict[str, list[Span]] = {name: [] for name in (_STEP, _WAIT, _START, _PROGRAM)}
    operations: list[Span] = []
    kinds: defaultdict[str, float] = defaultdict(float)
    for plane in trace.planes:
        for line in plane.lines:
            found = sorted(_operations(line.events, whole))
            operations += [span for span, _ in found]
            for name, own in _own_times(found):
                kinds[_kind(name)] += own
    begin, end = min(begin for begin, _ in whole[_STEP]), max(end for _, end in whole[_STEP])
    total, computed = end - begin, max(1.0, sum(kinds.values()))
    return Summary(
        updates=len(whole[_STEP]),
        seconds=total / 1e9,
        computing=_covered([*operations, *whole[_PROGRAM]], begin, end) / total,
        waiting=_covered(whole[_WAIT], begin, end) / total,
        starting=_covered(whole[_START], begin, end) / total,
        kinds=tuple((name, kinds[name] / computed) for name in sorted(kinds, key=lambda name: -kinds[name])),
    )


def _operations(events: Iterable[Any], whole: dict[str, list[Span]]) -> Iterator[tuple[Span, str]]:
    """Yields the device operations among the events of a thread or stream; adds other known events to `whole`."""
    for event in events:
        span = event.start_ns, event.start_ns + event.duration_ns
        if event.name in whole:
            whole[event.name].append(span)
        elif any(name == "hlo_op" for name, _ in event.stats) and event.duration_ns:
            yield span, event.name


def own_times(trace: ProfileData) -> Iterator[tuple[str, float]]:
    """Yields the name and the nanoseconds of each device operation in a trace, without operations nested in it."""
    for plane in trace.planes:
        for line in plane.lines:
            yield from _own_times(sorted(_operations(line.events, {})))


def _own_times(operations: Iterable[tuple[Span, str]]) -> Iterator[tuple[str, float]]:
    """Yields the time of each operation without nested ones, as in a loop. Operations must be sorted by start."""
    open_ones: list[tuple[float, str, float]] = []  # end, name, and time without nested operations
    for (begin, end), name in operations:
        while open_ones and open_ones[-1][0] <= begin:
            yield open_ones[-1][1], open_ones.pop()[2]
        if open_ones:
            outer_end, outer, left = open_ones[-1]
            open_ones[-1] = outer_end, outer, left - (min(end, outer_end) - begin)
        open_ones.append((end, name, end - begin))
    yield from ((name, left) for _, name, left in open_ones)


def _kind(name: str) -> str:
    """The name of an operation without its number.

    >>> _kind("broadcast_multiply_fusion.3.clone")
    'broadcast_multiply_fusion'
    """
    return re.sub(r"(\.(\d+|clone|remat\d*))+$", "", name)


def _covered(spans: Iterable[Span], begin: float, end: float) -> float:
    """The length of the part of [begin, end] that any of the spans covers.

    >>> _covered([(0, 4), (3, 6), (8, 12)], 1, 10)
    7.0
    """
    covered, reached = 0.0, begin
    for first, last in sorted(spans):
        first, last = max(first, reached), min(last, end)
        covered, reached = covered + max(0, last - first), max(reached, last)
    return covered
