"""The protocol of the warpgroups: no order of events goes wrong, and each row that keeps it so is needed."""

import dataclasses

import pytest

from seqattn.kernels.hopper import protocol
from seqattn.kernels.hopper.protocol import Action, Barrier, Index, Row
from tests.abstract_machine import ORDERING, fault, first_fault, replaced, rows

SLOTS = (1, 2, 3)


@pytest.mark.parametrize("slots", SLOTS)
def test_no_order_of_events_goes_wrong(slots):
    assert first_fault(protocol.forward(slots)) is None
    assert first_fault(protocol.observed(protocol.forward(slots))) is None


LEFT_OUT = [each for each in rows(protocol.forward(2)) if each[3].action in ORDERING]


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize(
    ("who", "part", "i"),
    [each[:3] for each in LEFT_OUT],
    ids=[f"{w}-{p}-{i}-{r.action.value}-{r.name}" for w, p, i, r in LEFT_OUT],
)
def test_a_row_that_is_left_out_is_found(slots, who, part, i):
    assert first_fault(replaced(protocol.forward(slots), who, part, i)) is not None


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("when", [protocol.When.ALWAYS, protocol.When.MORE, protocol.When.ANY])
def test_a_condition_of_a_wait_that_is_another_is_found(slots, when):
    table = protocol.forward(slots)
    for who, part, i, row in rows(table):
        same = {row.when, protocol.When.ALWAYS} if part == "step" else {row.when}
        if row.action is Action.WAIT and row.when is not protocol.When.ALWAYS and when not in same:
            changed = replaced(table, who, part, i, dataclasses.replace(row, when=when))
            assert first_fault(changed) is not None, (who, part, i, row)


def test_a_slot_that_is_freed_before_its_product_has_ended_is_found():
    table = protocol.forward(2)
    for name in ("key_free", "value_free"):
        i = table.consumer.step.index(Row(Action.ARRIVE, name, Index.SLOT))
        swapped = replaced(table, "consumer", "step", i, table.consumer.step[i - 1])
        swapped = replaced(swapped, "consumer", "step", i - 1, table.consumer.step[i])
        assert "overwritten while it is read" in first_fault(swapped)


def test_one_arrival_too_few_or_too_many_is_found():
    table = protocol.forward(2)
    for name, each in table.barriers.items():
        other = Barrier(each.count, 3 - each.arrivals)
        assert first_fault(dataclasses.replace(table, barriers={**table.barriers, name: other})) is not None, name


def test_the_checker_names_what_is_wrong():
    table = protocol.forward(2)
    early = replaced(table, "consumer", "before", 0)
    assert "reads ('query', 0), which holds None" in fault(early, 1)
    i = table.memory.step.index(Row(Action.WAIT, "key_free", Index.SLOT, protocol.When.AGAIN))
    assert "('key', 0)" in fault(replaced(table, "memory", "step", i), 3)
    i = table.consumer.step.index(Row(Action.ARRIVE, "value_free", Index.SLOT))
    assert "deadlock: warpgroup 0 waits for ever at wait value_free[0]" in first_fault(
        replaced(table, "consumer", "step", i)
    )
