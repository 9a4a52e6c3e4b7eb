"""The protocol of the backward pass, as a table of `protocol`: one for the kernels that own queries, one for keys.

One warpgroup copies tiles of the other side to a ring of slots. Two consumers with 64 rows each multiply them. There
are no turns: a consumer computes exponentials while its own product runs, or that of the other consumer.
"""

from collections.abc import Mapping

from seqattn.kernels.hopper.protocol import (
    CONSUMERS,
    Action,
    Barrier,
    Buffer,
    Index,
    Program,
    Protocol,
    Read,
    Row,
    When,
)

SIDES: Mapping[str, tuple[str, str]] = {"query": ("query", "d_output"), "key": ("key", "value")}
"""The arrays of each side: the first ones make scores, the second ones the gradients of weights."""


def other(side: str) -> str:
    """Returns the other side."""
    return "key" if side == "query" else "query"


def backward(slots: int, owner: str, results: tuple[str, ...]) -> Protocol:
    """Returns the protocol of a kernel of the backward pass.

    Args:
        slots: tiles of each array of the other side in the ring; at least 2, as the next tile is awaited before the
            last product frees a slot.
        owner: the side whose tiles the consumers own: "query" or "key".
        results: the gradients that the kernel computes: ("query",), or "key", "value" or both.
    """
    first, second = SIDES[other(owner)]
    owned = SIDES[owner] if results != ("value",) else SIDES[owner][:1]
    return Protocol(
        slots,
        barriers={
            **{f"{name}_ready": Barrier(CONSUMERS, arrivals=1) for name in owned},
            **{f"{name}_ready": Barrier(slots, arrivals=1) for name in (first, second)},
            # A slot is free when both consumers have read it.
            **{f"{name}_free": Barrier(slots, arrivals=CONSUMERS) for name in (first, second)},
        },
        buffers={
            **{name: Buffer(CONSUMERS, f"{name}_ready", owned=True) for name in owned},
            **{name: Buffer(slots, f"{name}_ready") for name in (first, second)},
        },
        products=_products(owner, results),
        memory=Program(
            before=tuple(Row(Action.LOAD, name, which) for name in owned for which in (Index.FIRST, Index.SECOND)),
            step=tuple(
                row
                # In the order in which the slots are freed.
                for name in ((first, second) if results == ("value",) else (second, first))
                for row in (
                    Row(Action.WAIT, f"{name}_free", Index.SLOT, When.AGAIN),
                    Row(Action.LOAD, name, Index.SLOT),
                )
            ),
            after=(),
        ),
        consumer=Program(
            before=(
                *(Row(Action.WAIT, f"{name}_ready", Index.OWN) for name in owned),
                Row(Action.WAIT, f"{first}_ready", Index.FIRST, When.ANY),
            ),
            step=_step(owner, results),
            after=_after(results),
        ),
    )


def _products(owner: str, results: tuple[str, ...]) -> dict[str, tuple[Read, ...]]:
    """Returns the buffers that each product reads."""
    walked = [Read(name, Index.SLOT) for name in SIDES[other(owner)]]
    both = [(Read(name, Index.OWN), tile) for name, tile in zip(SIDES[owner], walked, strict=True)]
    products: dict[str, tuple[Read, ...]] = {"scores": both[0]}
    if results != ("value",):
        products["d_weights"] = both[1]
    # The gradient of values is a sum of those of outputs, that of queries one of keys, and that of keys one of queries.
    return products | {f"d_{name}": (walked[name == "value"],) for name in results}


def _step(owner: str, results: tuple[str, ...]) -> tuple[Row, ...]:
    """Returns the rows of a step. A slot is freed as soon as the last product that reads it has ended."""
    first, second = SIDES[other(owner)]
    rows = [*_product("scores"), Row(Action.WAIT, f"{second}_ready", Index.SLOT)]
    # The next product follows the last one without a gap, so its tile is awaited while that one runs.
    ahead = Row(Action.WAIT, f"{first}_ready", Index.NEXT, When.MORE)
    free = {name: Row(Action.ARRIVE, f"{name}_free", Index.SLOT) for name in (first, second)}
    if results == ("value",):
        return (*rows[:2], free[first], rows[2], *_product("d_value", ahead), free[second])
    rows += _product("d_weights")
    if "value" in results:
        rows += _product("d_value")
    return (*rows, free[second], *_product(f"d_{owner}", ahead), free[first])


def _product(name: str, *meanwhile: Row) -> tuple[Row, ...]:
    """Returns the rows of a product, with others beside it."""
    return Row(Action.ISSUE, name), *meanwhile, Row(Action.FINISH, name)


def _after(results: tuple[str, ...]) -> tuple[Row, ...]:
    """Returns the rows that write the results."""
    # A gradient takes the place of a tile that the consumer owns, which all its products have read.
    places = ("key",) if results == ("value",) else results
    return (
        *(Row(Action.WRITE, name, Index.OWN) for name in places),
        Row(Action.FENCE, places[0], Index.OWN),
        *(Row(Action.STORE, name, Index.OWN) for name in places),
        Row(Action.DRAIN, places[0], Index.OWN),
    )
