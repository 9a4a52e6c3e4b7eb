"""The protocols of the backward pass: no order of events goes wrong, and each row that keeps it so is needed."""

import dataclasses

import pytest

from seqattn.kernels.hopper import protocol
from seqattn.kernels.hopper.backward_protocol import backward
from seqattn.kernels.hopper.protocol import Action, Barrier, Index, Row, When
from tests.abstract_machine import ORDERING, first_fault, replaced, rows

KERNELS = {
    "queries": ("query", ("query",)),
    "keys and values": ("key", ("key", "value")),
    "keys": ("key", ("key",)),
    "values": ("key", ("value",)),
}
SLOTS = 2
LEFT_OUT = [
    (name, who, part, i, row)
    for name, kernel in KERNELS.items()
    for who, part, i, row in rows(backward(SLOTS, *kernel))
    if row.action in ORDERING
]


@pytest.mark.parametrize("slots", [SLOTS, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KERNELS)
def test_no_order_of_events_goes_wrong(name, slots):
    table = backward(slots, *KERNELS[name])
    assert first_fault(table) is None
    assert first_fault(protocol.observed(table)) is None


@pytest.mark.parametrize(
    ("name", "who", "part", "i"),
    [each[:4] for each in LEFT_OUT],
    ids=[f"{n}-{w}-{p}-{i}-{r.action.value}-{r.name}" for n, w, p, i, r in LEFT_OUT],
)
def test_a_row_that_is_left_out_is_found(name, who, part, i):
    assert first_fault(replaced(backward(SLOTS, *KERNELS[name]), who, part, i)) is not None


def test_one_slot_is_too_few():
    assert "deadlock" in first_fault(backward(1, *KERNELS["queries"]))


@pytest.mark.parametrize("name", KERNELS)
def test_a_condition_of_a_wait_that_is_another_is_found(name):
    table = backward(SLOTS, *KERNELS[name])
    for who, part, i, row in rows(table):
        for when in (When.ALWAYS, When.MORE, When.ANY):
            same = {row.when, When.ALWAYS} if part == "step" else {row.when}
            if row.action is Action.WAIT and row.when is not When.ALWAYS and when not in same:
                changed = replaced(table, who, part, i, dataclasses.replace(row, when=when))
                assert first_fault(changed) is not None, (who, part, i, row, when)


@pytest.mark.parametrize("name", KERNELS)
def test_a_slot_that_is_freed_before_its_last_product_has_ended_is_found(name):
    table = backward(SLOTS, *KERNELS[name])
    free = [row for row in table.consumer.step if row.action is Action.ARRIVE]
    assert len(free) == 2
    for row in free:
        i = table.consumer.step.index(row)
        swapped = replaced(table, "consumer", "step", i, table.consumer.step[i - 1])
        swapped = replaced(swapped, "consumer", "step", i - 1, row)
        assert "overwritten while it is read" in first_fault(swapped)


@pytest.mark.parametrize("name", KERNELS)
def test_one_arrival_too_few_or_too_many_is_found(name):
    table = backward(SLOTS, *KERNELS[name])
    for barrier, each in table.barriers.items():
        other = Barrier(each.count, 3 - each.arrivals)
        assert first_fault(dataclasses.replace(table, barriers={**table.barriers, barrier: other})) is not None, barrier


def test_values_alone_load_no_values():
    assert set(backward(SLOTS, *KERNELS["values"]).buffers) == {"key", "query", "d_output"}


def test_a_slot_of_outputs_is_free_before_the_last_product_begins():
    for name, kernel in KERNELS.items():
        if name == "values":
            continue
        step, second = backward(SLOTS, *kernel).consumer.step, "value" if name == "queries" else "d_output"
        freed = step.index(Row(Action.ARRIVE, f"{second}_free", Index.SLOT))
        assert freed < step.index(Row(Action.ISSUE, f"d_{kernel[0]}"))
