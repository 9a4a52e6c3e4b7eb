"""Where the time of some updates went: a trace for the tools that show it, and a few lines that sum it up."""

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
"""What XLA's CPU client calls the run of a whole program, of which traces lack what no operation of it does: calls of
libraries, threads that hand over."""
_KINDS = 8

Span = tuple[float, float]
"""Begin and end, in nanoseconds."""


@dataclass(frozen=True)
class Summary:
    """Where the time of some updates went.

    Attributes:
        updates: how many.
        seconds: from the begin of the first to the end of the last, with whatever is done between them.
        computing: share of the time in which any operation ran on the devices of this process, one that waits for other
            devices too, or on CPU devices a program; the rest is overhead, of the loop or of XLA.
        waiting: share of the time in which the loop waited for batches.
        starting: share of the time in which it started updates, beside which devices compute; of several CPU devices
            updates are waited for there, too.
        kinds: share of each kind of operation in what all operations took, the largest first.
    """

    updates: int
    seconds: float
    computing: float
    waiting: float
    starting: float
    kinds: tuple[tuple[str, float], ...]

    def lines(self) -> list[str]:
        """For people."""
        kinds = ", ".join(f"{name} {share:.1%}" for name, share in self.kinds[:_KINDS])
        return [
            f"{self.updates} updates of {1e3 * self.seconds / self.updates:,.1f} ms: devices computed "
            f"{self.computing:.1%} of the time; the loop waited for batches {self.waiting:.1%} and started updates "
            f"{self.starting:.1%} of it",
            f"of what was computed: {kinds}",
        ]


class Profile:
    """Traces the updates of a run from one step to another.

    Args:
        steps: "20:25" for updates 20 to 25; None for no trace. The first one that this process makes is left out, since
            it compiles.
        folder: gets the trace, which TensorBoard shows and, its `.trace.json.gz`, https://ui.perfetto.dev.
        say: is given lines for people.
    """

    def __init__(self, steps: str | None, folder: Path, say: Callable[[str], None]) -> None:
        self._steps = steps
        self._first, self._last = (0, 0) if steps is None else parse_steps(steps)
        self._folder, self._say = folder, say
        self._compiled, self._open = False, False
        self._traced: list[int] = []

    @contextmanager
    def step(self, step: int, state: Any) -> Iterator[Callable[[Any], Any]]:
        """An update of a state; what is yielded is given the new one, and waits for it where the trace ends."""
        wanted, self._compiled = self._compiled and self._first <= step <= self._last, True
        if wanted and not self._traced:
            jax.block_until_ready(state)  # of updates before
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
        """Ends a trace that has begun, also of a run that stops before its last update, and says what it shows."""
        if self._open:
            self._open = False
            self._attempt(self._end)
        elif self._steps is not None and not self._traced:
            self._say(f"none of the updates {self._steps} was traced: they were made before, or not at all")

    def _begin(self) -> None:
        options = ProfileOptions()
        options.python_tracer_level = 0  # each call of a function would be an event, and slow the loop
        (self._folder / "plugins" / "profile").mkdir(parents=True, exist_ok=True)  # where it is written to
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._open = True

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self._say(f"trace of updates {self._traced[0]} to {self._traced[-1]} in {self._folder}")
        for line in summary(newest(self._folder)).lines():
            self._say(line)

    def _attempt(self, act: Callable[[], None]) -> None:
        """Has a trace begin or end; where it cannot, says so, and training goes on without."""
        try:
            act()
        except Exception as error:  # of the disk, or of XLA
            self._say(f"updates {self._steps} are not traced: {type(error).__name__}: {error}")
            self._steps, self._first, self._last = None, 0, 0

    waiting = staticmethod(lambda: TraceAnnotation(_WAIT))
    """What happens within is waiting for a batch."""
    starting = staticmethod(lambda: TraceAnnotation(_START))
    """What happens within is starting an update."""


def parse_steps(steps: str) -> tuple[int, int]:
    """The first and the last step of "20:25".

    Raises:
        ValueError: it is something else, or the last one is before the first.

    >>> parse_steps("20:25")
    (20, 25)
    """
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", steps)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"profile ({steps}) must be the numbers of the first and the last update, such as 20:25")
    return first, last


def newest(folder: Path) -> ProfileData:
    """The latest trace in a folder that `jax.profiler` wrote to."""
    return ProfileData.from_file(str(max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)))


def summary(trace: ProfileData) -> Summary:
    """What a trace says."""
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
    """The operations of devices among the events of a thread or stream; what they are part of is put under its name."""
    for event in events:
        span = event.start_ns, event.start_ns + event.duration_ns
        if event.name in whole:
            whole[event.name].append(span)
        elif any(name == "hlo_op" for name, _ in event.stats) and event.duration_ns:
            yield span, event.name


def _own_times(operations: Iterable[tuple[Span, str]]) -> Iterator[tuple[str, float]]:
    """What each operation took without those within it, as in a loop; they are in order of their begins."""
    open_ones: list[tuple[float, str, float]] = []  # end, name, what is left of its time
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
    """How much of the time from begin to end any of the spans covers.

    >>> _covered([(0, 4), (3, 6), (8, 12)], 1, 10)
    7.0
    """
    covered, reached = 0.0, begin
    for first, last in sorted(spans):
        first, last = max(first, reached), min(last, end)
        covered, reached = covered + max(0, last - first), max(reached, last)
    return covered
