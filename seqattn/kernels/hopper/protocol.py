"""The protocol of the warpgroups, as a table: who loads, waits, arrives, multiplies and stores, and in which order.

`forward.py` builds the kernel from the table. The tests execute the same table as an abstract machine, in all orders in
which warpgroups and copies may proceed. A wait or an arrival that is missing is therefore found without a device.

The form is that of FlashAttention-3 (Shah 2024, algorithm 2). One warpgroup copies tiles of keys and values to a ring
of slots in shared memory. Two consumer warpgroups with 64 query rows each multiply them. The consumers take turns: one
computes exponentials while the products of the other occupy the tensor cores (section 3.1, "ping-pong").
"""

import dataclasses
import enum
from collections.abc import Mapping

CONSUMERS = 2
"""Consumer warpgroups of a block, each with its own tile of queries."""


class Action(enum.Enum):
    """What a row of the table does.

    A copy and a product are asynchronous: they read or write shared memory until a later row has waited for them.
    """

    WAIT = "wait"
    """Waits for the next phase of a barrier."""
    ARRIVE = "arrive"
    """Arrives at a barrier."""
    LOAD = "load"
    """Starts a copy (TMA) from global memory to a buffer. Its end arrives at the barrier `Buffer.ready`."""
    ISSUE = "issue"
    """Starts a product (wgmma), which reads its buffers from now on."""
    FINISH = "finish"
    """Waits for the product."""
    ENTER = "enter"
    """Begins a region in which at most one consumer may be."""
    LEAVE = "leave"
    """Ends the region."""
    WRITE = "write"
    """Writes registers to a buffer."""
    FENCE = "fence"
    """Makes written registers visible to copies."""
    STORE = "store"
    """Starts a copy from a buffer to global memory."""
    DRAIN = "drain"
    """Waits for the stores."""


class Index(enum.Enum):
    """Which one of several barriers or buffers of a name."""

    ONLY = "only"
    """There is one."""
    FIRST = "first"
    """The first one."""
    SECOND = "second"
    """The second one."""
    OWN = "own"
    """That of the consumer that runs the row."""
    SLOT = "slot"
    """The slot of this step."""
    NEXT = "next"
    """The slot of the next step."""


class When(enum.Enum):
    """Which warpgroups run a row, and at which steps."""

    ALWAYS = "always"
    ANY = "any"
    """If there is a step at all."""
    AGAIN = "again"
    """If the slot was used before: from step `slots` on."""
    MORE = "more"
    """If another step follows."""
    TILE = "tile"
    """If the step has a tile, and is none of those that `Program.more` adds."""
    FIRST = "first"
    """In the first consumer."""
    SECOND = "second"
    """In the second consumer."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        action: what it does.
        name: the barrier, buffer, product or region.
        index: which one of that name.
        when: a condition.
    """

    action: Action
    name: str
    index: Index = Index.ONLY
    when: When = When.ALWAYS


@dataclasses.dataclass(frozen=True)
class Program:
    """The rows of a warpgroup: before all steps, in each step, and after them. A step is a tile of the other side.

    Attributes:
        before: rows before the steps.
        step: rows of a step.
        after: rows after the steps.
        more: steps after the last tile.
    """

    before: tuple[Row, ...]
    step: tuple[Row, ...]
    after: tuple[Row, ...]
    more: int = 0


@dataclasses.dataclass(frozen=True)
class Barrier:
    """Barriers of a name.

    Attributes:
        count: how many there are.
        arrivals: arrivals that complete a phase.
    """

    count: int
    arrivals: int


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Tiles in shared memory.

    Attributes:
        count: how many there are.
        ready: the barrier, with the same index, at which a load arrives.
        owned: whether each consumer has one of its own. All others hold the tile of a step.
    """

    count: int
    ready: str
    owned: bool = False


@dataclasses.dataclass(frozen=True)
class Read:
    """A buffer that a product reads."""

    buffer: str
    index: Index


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The table.

    Attributes:
        slots: tiles of keys, and of values, that the ring holds.
        barriers: barriers by name.
        buffers: buffers by name.
        products: the buffers that each product reads.
        memory: the rows of the memory warpgroup.
        consumer: the rows of each consumer.
    """

    slots: int
    barriers: Mapping[str, Barrier]
    buffers: Mapping[str, Buffer]
    products: Mapping[str, tuple[Read, ...]]
    memory: Program
    consumer: Program


def forward(slots: int) -> Protocol:
    """Returns the protocol of the forward pass.

    Args:
        slots: tiles of keys, and of values, in the ring; at least 1.
    """
    both = Barrier(slots, arrivals=CONSUMERS)
    return Protocol(
        slots,
        barriers={
            "query_ready": Barrier(CONSUMERS, arrivals=1),
            "key_ready": Barrier(slots, arrivals=1),
            "value_ready": Barrier(slots, arrivals=1),
            # A slot is free when both consumers have read it.
            "key_free": both,
            "value_free": both,
            # Each phase hands the tensor cores from one consumer to the other.
            "turn": Barrier(1, arrivals=CONSUMERS),
        },
        buffers={
            "query": Buffer(CONSUMERS, "query_ready", owned=True),
            "key": Buffer(slots, "key_ready"),
            "value": Buffer(slots, "value_ready"),
        },
        products={
            "scores": (Read("query", Index.OWN), Read("key", Index.SLOT)),
            "output": (Read("value", Index.SLOT),),
        },
        memory=_MEMORY,
        consumer=_CONSUMER,
    )


def observed(table: Protocol) -> Protocol:
    """Returns a table with waits for the phases that nobody needs.

    The interpreter requires that a thread which waits at a barrier waits for each of its phases.
    """
    after = table.consumer.after
    if _LAST_TURN in after:
        turn = after.index(_LAST_TURN) + 1
        after = (*after[:turn], Row(Action.WAIT, "turn", when=When.FIRST), *after[turn:])
    loads = [
        dataclasses.replace(row, when=When.TILE) if row.action is Action.LOAD else row for row in table.memory.step
    ]
    return dataclasses.replace(
        table,
        memory=dataclasses.replace(table.memory, step=tuple(loads), more=table.slots),
        consumer=dataclasses.replace(table.consumer, after=after),
    )


_MEMORY = Program(
    before=(Row(Action.LOAD, "query", Index.FIRST), Row(Action.LOAD, "query", Index.SECOND)),
    step=(
        # Keys and values have barriers of their own, so that the next keys are on the way while values are still read.
        Row(Action.WAIT, "key_free", Index.SLOT, When.AGAIN),
        Row(Action.LOAD, "key", Index.SLOT),
        Row(Action.WAIT, "value_free", Index.SLOT, When.AGAIN),
        Row(Action.LOAD, "value", Index.SLOT),
    ),
    after=(),
)

_PASS_TURN = (Row(Action.ARRIVE, "turn"), Row(Action.WAIT, "turn"))

_LAST_TURN = Row(Action.ARRIVE, "turn", when=When.FIRST)

_CONSUMER = Program(
    before=(
        Row(Action.WAIT, "query_ready", Index.OWN),
        Row(Action.WAIT, "key_ready", Index.FIRST, When.ANY),
        # The second consumer starts half a step later: its products then run beside the exponentials of the first.
        *(dataclasses.replace(row, when=When.SECOND) for row in _PASS_TURN),
    ),
    step=(
        Row(Action.ISSUE, "scores"),
        *_PASS_TURN,
        Row(Action.FINISH, "scores"),
        Row(Action.ARRIVE, "key_free", Index.SLOT),
        Row(Action.ENTER, "exponentials"),
        Row(Action.LEAVE, "exponentials"),
        Row(Action.ARRIVE, "turn"),
        # The wait for the values lies between the arrival and the wait of the turn, where it delays nobody else.
        Row(Action.WAIT, "value_ready", Index.SLOT),
        Row(Action.WAIT, "turn"),
        Row(Action.ISSUE, "output"),
        # The next product follows this one without a gap, so its keys are awaited while this one runs.
        Row(Action.WAIT, "key_ready", Index.NEXT, When.MORE),
        Row(Action.FINISH, "output"),
        Row(Action.ARRIVE, "value_free", Index.SLOT),
    ),
    after=(
        # The second consumer is half a step behind and waits for one more arrival. The first need not wait for it.
        _LAST_TURN,
        # The output takes the place of the queries, which all products have read.
        Row(Action.WRITE, "query", Index.OWN),
        Row(Action.FENCE, "query", Index.OWN),
        Row(Action.STORE, "query", Index.OWN),
        Row(Action.DRAIN, "query", Index.OWN),
    ),
)
