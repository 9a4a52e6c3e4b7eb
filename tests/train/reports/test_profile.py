"""Where the time of updates goes, of a trace and of a run."""

import dataclasses
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from train.engine import loop
from train.reports import profile
from train.reports.profile import Profile, newest, parse_steps, summary


@pytest.mark.parametrize("steps", ["", "20", "0:5", "7:6", "a:b", "1:2:3", "-1:4", "1 : 2", "٣:٤"])
def test_what_names_no_updates_is_refused(steps, tiny):
    with pytest.raises(ValueError, match=r"profile \(.*\) must be the numbers of the first and the last update"):
        dataclasses.replace(tiny, profile=steps)


def test_an_operation_within_another_is_not_counted_twice():
    found = [
        ((0, 100), "while.1"),
        ((10, 40), "dot.2"),
        ((15, 20), "add.1"),
        ((50, 60), "dot.3"),
        ((100, 130), "dot.4"),
    ]
    assert sorted(profile._own_times(found)) == [
        ("add.1", 5),
        ("dot.2", 25),
        ("dot.3", 10),
        ("dot.4", 30),
        ("while.1", 60),
    ]


def test_devices_compute_while_any_operation_or_program_runs():
    def event(name, begin, end, **stats):
        return SimpleNamespace(name=name, start_ns=begin, duration_ns=end - begin, stats=stats.items())

    operation = {"hlo_op": "dot"}
    loop = [event(profile._STEP, 0, 100), event(profile._WAIT, 0, 5), event(profile._START, 5, 15)]
    device = [event("dot.1", 20, 40, **operation), event("dot.2", 60, 80, **operation), event("a library", 85, 90)]
    lines = [SimpleNamespace(events=events) for events in (loop, device)]
    assert summary(SimpleNamespace(planes=[SimpleNamespace(lines=lines)])).computing == 0.4
    lines.append(SimpleNamespace(events=[event(profile._PROGRAM, 20, 90)]))
    found = summary(SimpleNamespace(planes=[SimpleNamespace(lines=lines)]))
    assert (found.computing, found.waiting, found.starting) == (0.7, 0.05, 0.1)
    assert found.kinds == (("dot", 1.0),)


@pytest.fixture
def traced(tmp_path):
    """Traces updates 3 to 5 of seven, each of which waits, and starts a computation; what was said."""

    def run(wait, steps="3:5"):
        said, size = [], 67
        profiled = Profile(steps, tmp_path, said.append)
        compute = jax.jit(lambda x: jnp.tanh(x @ x))
        state = compute(jnp.ones((size, size)))
        for step in range(1, 8):
            with profiled.step(step, state) as finished:
                with profiled.waiting():
                    time.sleep(wait)
                with profiled.starting():
                    state = compute(state)
                finished(state)
        profiled.close()
        return said

    return run


def test_a_loop_that_waits_is_seen_to_wait(traced, tmp_path):
    said = traced(0.2)
    found = summary(newest(tmp_path))
    assert found.updates == 3
    assert found.seconds > 0.6
    assert found.waiting > 0.5  # of a computation that takes microseconds
    assert 0 < found.computing < 0.5
    assert 0 < found.starting < 0.5
    assert sum(share for _, share in found.kinds) == pytest.approx(1)
    assert said == [f"trace of updates 3 to 5 in {tmp_path}", *found.lines()]


def test_a_trace_that_cannot_be_written_is_only_told(traced, tmp_path):
    (tmp_path / "plugins").touch()
    (said,) = traced(0)
    assert said.startswith("updates 3:5 are not traced: ")
    (tmp_path / "plugins").unlink()
    assert traced(0)[0].startswith("trace of updates 3 to 5")


@pytest.mark.parametrize("steps", ["1:1", "8:9"])
def test_updates_that_are_not_made_or_that_compile_are_not_traced(steps, traced, tmp_path):
    assert traced(0, steps) == [f"none of the updates {steps} was traced: this session did not make them"]
    assert not list(tmp_path.iterdir())


def test_a_range_behind_the_last_update_is_refused(tiny):
    with pytest.raises(ValueError, match=r"profile \(13:15\) must begin by the last update: steps \(12\)"):
        dataclasses.replace(tiny, profile="13:15")


def test_without_steps_nothing_is_traced(traced, tmp_path):
    assert traced(0, None) == []
    assert not list(tmp_path.iterdir())


def test_a_trace_that_a_signal_cuts_short_is_whole(tiny, tmp_path, interrupted, capsys):
    experiment = dataclasses.replace(tiny, run=tmp_path / "run", profile="3:11")
    interrupted(experiment, 5)
    assert "trace of updates 3 to 5 in" in capsys.readouterr().out
    assert summary(newest(experiment.run / "profile")).updates == 3


def test_a_run_traces_the_updates_that_it_makes(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    assert loop.train(dataclasses.replace(tiny, run=folder, profile="9:11")) == 0
    assert f"trace of updates 9 to 11 in {folder / 'profile'}" in capsys.readouterr().out
    found = summary(newest(folder / "profile"))
    assert found.updates == 3
    assert 0 < found.computing <= 1
    assert parse_steps("9:11") == (9, 11)
