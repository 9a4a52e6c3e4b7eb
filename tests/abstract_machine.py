"""An abstract machine that executes a protocol of warpgroups in all possible orders, and tells what goes wrong.

It knows no arithmetic. A barrier behaves as an mbarrier of the PTX ISA: it counts arrivals, and a wait passes if the
phase of the wait's parity is over. So a thread that misses a phase waits for the wrong one here as well.
"""

import collections
import dataclasses
from collections.abc import Iterator

from seqattn.kernels.hopper.protocol import CONSUMERS, Action, Index, Program, Protocol, Row, When

Place = tuple[str, int]
"""A barrier or a buffer: its name and its index."""


@dataclasses.dataclass(frozen=True)
class _Operation:
    """A row at one step, as a warpgroup executes it.

    Attributes:
        row: the row.
        place: the barrier or the buffer.
        holds: what a load brings.
        reads: the buffers of a product, each with what it must hold.
        parity: of the phase for which a wait waits.
    """

    row: Row
    place: Place
    holds: int = 0
    reads: tuple[tuple[Place, int], ...] = ()
    parity: int = 0


@dataclasses.dataclass(frozen=True)
class _Now:
    """What lasts between two operations of one warpgroup: it follows from how far the warpgroup has come."""

    reads: tuple[Place, ...] = ()
    inside: tuple[str, ...] = ()
    unfenced: tuple[Place, ...] = ()
    stores: tuple[Place, ...] = ()


@dataclasses.dataclass(frozen=True)
class _State:
    """A state of the machine.

    Attributes:
        at: how many operations each warpgroup has executed.
        barriers: phases that are over and arrivals of the present one, for each barrier.
        buffers: what each buffer holds, or None.
        loads: buffers that are being loaded, and with what.
    """

    at: tuple[int, ...]
    barriers: tuple[tuple[int, int], ...]
    buffers: tuple[int | None, ...]
    loads: frozenset[tuple[Place, int]]


STEPS = (0, 1, 2, 3, 5)
"""Numbers of steps: with the most, each of two slots is used twice, and one more."""

ORDERING = (Action.WAIT, Action.ARRIVE, Action.FINISH, Action.FENCE, Action.DRAIN)
"""Actions whose only purpose is the order of others."""


def rows(table: Protocol) -> list[tuple[str, str, int, Row]]:
    """Each row with its place: the warpgroup, the part of its program, and the number."""
    return [
        (who, part, i, row)
        for who in ("memory", "consumer")
        for part in ("before", "step", "after")
        for i, row in enumerate(getattr(getattr(table, who), part))
    ]


def replaced(table: Protocol, who: str, part: str, i: int, *new: Row) -> Protocol:
    """The table with other rows in the place of one."""
    program: Program = getattr(table, who)
    old = getattr(program, part)
    return dataclasses.replace(table, **{who: dataclasses.replace(program, **{part: (*old[:i], *new, *old[i + 1 :])})})


def first_fault(table: Protocol) -> str | None:
    """What goes wrong with the fewest steps."""
    return next((told for steps in STEPS if (told := fault(table, steps)) is not None), None)


def fault(protocol: Protocol, steps: int) -> str | None:
    """Returns what can go wrong with this number of steps, or None if every order of events ends well."""
    return _Machine(protocol, steps).fault()


class _Machine:
    def __init__(self, protocol: Protocol, steps: int) -> None:
        self.protocol, self.steps = protocol, steps
        programs = [protocol.memory, *[protocol.consumer] * CONSUMERS]
        self.operations = [_unrolled(protocol, program, steps, i - 1) for i, program in enumerate(programs)]
        self.now = [_lasting(each) for each in self.operations]
        self.barriers = [(name, i) for name, each in protocol.barriers.items() for i in range(each.count)]
        self.buffers = [(name, i) for name, each in protocol.buffers.items() for i in range(each.count)]
        self.count = 0

    def fault(self) -> str | None:
        first = _State(
            (0,) * len(self.operations), ((0, 0),) * len(self.barriers), (None,) * len(self.buffers), frozenset()
        )
        seen, waiting = {first}, collections.deque([first])
        while waiting:
            state = waiting.popleft()
            self.count += 1
            following = list(self._following(state))
            told = next((each for each in following if isinstance(each, str)), None)
            if told is not None:
                return told
            if not following and (told := self._unfinished(state)) is not None:
                return told
            new = [each for each in following if isinstance(each, _State) and each not in seen]
            seen.update(new)
            waiting.extend(new)
        return None

    def _unfinished(self, state: _State) -> str | None:
        """What is left when nothing can happen any more."""
        for who, (at, operations) in enumerate(zip(state.at, self.operations, strict=True)):
            if at < len(operations):
                return f"deadlock: warpgroup {who} waits for ever at {_told(operations[at])}"
        return None

    def _following(self, state: _State) -> Iterator[_State | str]:
        """The states after one more event, or what is wrong with the event."""
        for load in state.loads:
            yield self._arrived(state, *load)
        for who, operations in enumerate(self.operations):
            if state.at[who] == len(operations):
                now = self.now[who][-1]
                if now.stores or now.reads:
                    yield f"warpgroup {who} ends while {now.stores or now.reads} is read"
                elif state.loads and all(n == len(x) for n, x in zip(state.at, self.operations, strict=True)):
                    yield f"the block ends while {sorted(state.loads)} is loaded"
                continue
            operation = operations[state.at[who]]
            if operation.row.action is Action.WAIT:
                over, _ = state.barriers[self.barriers.index(operation.place)]
                # The present phase has the parity of the number of phases that are over.
                if over % 2 == operation.parity:
                    continue
            told = self._wrong(state, who, operation)
            yield self._after(state, who, operation) if told is None else f"warpgroup {who}, {_told(operation)}: {told}"

    def _wrong(self, state: _State, who: int, operation: _Operation) -> str | None:
        """What is wrong with an operation in a state."""
        lasting = [now[at] for now, at in zip(self.now, state.at, strict=True)]
        busy = {place for now in lasting for place in (*now.reads, *now.stores)}
        loading = {place for place, _ in state.loads}
        match operation.row.action:
            case Action.LOAD | Action.WRITE if operation.place in busy:
                return f"{operation.place} is overwritten while it is read"
            case Action.LOAD | Action.WRITE | Action.STORE if operation.place in loading:
                return f"{operation.place} is still being loaded"
            case Action.STORE if operation.place in lasting[who].unfenced:
                return f"{operation.place} is stored without a fence"
            case Action.ENTER if any(operation.row.name in now.inside for i, now in enumerate(lasting) if i != who):
                return f"two are in {operation.row.name}"
            case Action.ISSUE:
                for place, expected in operation.reads:
                    held = state.buffers[self.buffers.index(place)]
                    if held != expected:
                        return f"reads {place}, which holds {held} and not {expected}"
        return None

    def _after(self, state: _State, who: int, operation: _Operation) -> _State:
        """The state after an operation."""
        at = tuple(n + (i == who) for i, n in enumerate(state.at))
        state = dataclasses.replace(state, at=at)
        if operation.row.action is Action.ARRIVE:
            return self._arrive(state, operation.place)
        if operation.row.action in (Action.LOAD, Action.WRITE):
            # Until the load arrives, the buffer holds a part of the old and a part of the new tile.
            state = dataclasses.replace(state, buffers=self._with(state, operation.place, None))
        if operation.row.action is Action.LOAD:
            return dataclasses.replace(state, loads=state.loads | {(operation.place, operation.holds)})
        return state

    def _arrived(self, state: _State, place: Place, holds: int) -> _State:
        """The state after a load has arrived."""
        state = dataclasses.replace(
            state, buffers=self._with(state, place, holds), loads=state.loads - {(place, holds)}
        )
        return self._arrive(state, (self.protocol.buffers[place[0]].ready, place[1]))

    def _with(self, state: _State, place: Place, holds: int | None) -> tuple[int | None, ...]:
        return tuple(holds if each == place else x for each, x in zip(self.buffers, state.buffers, strict=True))

    def _arrive(self, state: _State, place: Place) -> _State:
        over, arrivals = state.barriers[self.barriers.index(place)]
        full = arrivals + 1 == self.protocol.barriers[place[0]].arrivals
        new = (over + 1, 0) if full else (over, arrivals + 1)
        changed = tuple(new if each == place else x for each, x in zip(self.barriers, state.barriers, strict=True))
        return dataclasses.replace(state, barriers=changed)


def _unrolled(protocol: Protocol, program: Program, steps: int, consumer: int) -> list[_Operation]:
    """The operations of a warpgroup, one after the other; `consumer` is -1 for the memory warpgroup."""
    rows = [(row, 0) for row in program.before]
    rows += [(row, step) for step in range(steps + program.more) for row in program.step]
    rows += [(row, steps) for row in program.after]
    waits: dict[Place, int] = collections.Counter()
    owned = {name for name, each in protocol.buffers.items() if each.owned}
    operations = []
    for row, step in rows:
        if not _runs(protocol, row.when, step, steps, consumer):
            continue

        def index(which: Index, step: int = step) -> int:
            numbers = {Index.OWN: consumer, Index.SLOT: step % protocol.slots, Index.NEXT: (step + 1) % protocol.slots}
            return numbers.get(which, int(which is Index.SECOND))

        place = row.name, index(row.index)
        # A buffer of its own holds the tile of its consumer, all others that of a step.
        holds = place[1] if row.name in owned else step
        reads = tuple(
            ((read.buffer, index(read.index)), consumer if read.buffer in owned else step)
            for read in protocol.products.get(row.name, ())
        )
        operations.append(_Operation(row, place, holds, reads, parity=waits[place] % 2))
        waits[place] += row.action is Action.WAIT
    return operations


def _runs(protocol: Protocol, when: When, step: int, steps: int, consumer: int) -> bool:
    """Whether a row runs at a step."""
    conditions = {
        When.ALWAYS: True,
        When.ANY: steps > 0,
        When.AGAIN: step >= protocol.slots,
        When.MORE: step + 1 < steps,
        When.TILE: step < steps,
        When.FIRST: consumer == 0,
        When.SECOND: consumer == 1,
    }
    return conditions[when]


def _lasting(operations: list[_Operation]) -> list[_Now]:
    """What lasts before each operation and after the last one."""
    now, all_of_them = _Now(), []
    running: dict[str, tuple[Place, ...]] = {}
    for operation in operations:
        all_of_them.append(now)
        name, place = operation.row.name, operation.place
        match operation.row.action:
            case Action.ISSUE:
                running[name] = tuple(place for place, _ in operation.reads)
            case Action.FINISH:
                running.pop(name, None)
            case Action.ENTER:
                now = dataclasses.replace(now, inside=(*now.inside, name))
            case Action.LEAVE:
                now = dataclasses.replace(now, inside=tuple(each for each in now.inside if each != name))
            case Action.WRITE:
                now = dataclasses.replace(now, unfenced=(*now.unfenced, place))
            case Action.FENCE:
                now = dataclasses.replace(now, unfenced=())
            case Action.STORE:
                now = dataclasses.replace(now, stores=(*now.stores, place))
            case Action.DRAIN:
                now = dataclasses.replace(now, stores=())
        now = dataclasses.replace(now, reads=tuple(place for places in running.values() for place in places))
    return [*all_of_them, now]


def _told(operation: _Operation) -> str:
    return f"{operation.row.action.value} {operation.place[0]}[{operation.place[1]}]"
