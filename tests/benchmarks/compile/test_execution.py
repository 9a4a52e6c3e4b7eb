"""Programs that run here, beside the results of a process of the CPU."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.bench.record import NOT_INSTALLED, REFUSED, WRONG
from benchmarks.compile import execution
from benchmarks.compile.execution import AGREES, FAILED, NOT_COMPARED, ExecutionArguments, compare, errors, main
from benchmarks.compile.program import Built, Program
from benchmarks.compile.work import Work

SIZE = 33


def program(name, function, outcome=None):
    def build(devices, platform):
        if outcome is not None:
            raise outcome
        x = jax.ShapeDtypeStruct((2, SIZE, 3, 5), jnp.bfloat16)
        return Built(jax.jit(function).trace(x, x).lower(), Work(0.0))

    return Program(name, (1,), build, {"mask": "causal"})


def added(x, y):
    return x + y, (x * y).astype(jnp.float32).sum()


PROGRAMS = {
    each.name: each
    for each in (
        program("attention/chunked/causal/t33/fwd", added),
        program("attention/other/causal/t33/fwd", lambda x, y: (y + x, (y * x).astype(jnp.float32).sum())),
        program("attention/wrong/causal/t33/fwd", lambda x, y: (x + y * 1.1, (x * y).astype(jnp.float32).sum())),
        program("attention/unable/causal/t33/fwd", added, NotImplementedError("no windows")),
        program("attention/broken/causal/t33/fwd", added, RuntimeError("out of registers")),
        program("decode/alone/t33", added, RuntimeError("no result of the CPU")),
    )
}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(execution, "programs_here", lambda length: (PROGRAMS, {"update": "No module named 'datasets'"}))


def test_results_are_compared_with_those_of_chunked(few, tmp_path, capsys):
    assert main(ExecutionArguments(write=tmp_path / "cpu", length=128)) == 0
    assert sorted(path.name for path in (tmp_path / "cpu").iterdir()) == ["attention-chunked-causal-t33-fwd.npz"]
    kept = tmp_path / "deep" / "rows.jsonl"
    assert main(ExecutionArguments(against=tmp_path / "cpu", length=128, json=kept)) == 1
    rows = {row["program"]: row for row in map(json.loads, kept.read_text("utf-8").splitlines())}
    outcome = {name.split("/")[1] if "/" in name else name: row["status"] for name, row in rows.items()}
    assert outcome == {
        "chunked": AGREES,
        "other": AGREES,
        "wrong": WRONG,
        "unable": REFUSED,
        "broken": FAILED,
        "alone": NOT_COMPARED,
        "update": NOT_INSTALLED,
    }
    assert rows["attention/unable/causal/t33/fwd"]["reason"] == "no windows"
    assert rows["attention/wrong/causal/t33/fwd"]["reason"].startswith("array 0 of 2 differs by 0.0")
    assert rows["attention/chunked/causal/t33/fwd"]["largest_relative_error"] == 0
    assert "2 agrees" in capsys.readouterr().out


def test_all_that_agrees_is_a_success_and_nothing_compared_is_none(few, tmp_path, capsys):
    main(ExecutionArguments(write=tmp_path, length=128))
    only = ("attention/chunked", "attention/other", "attention/unable")
    assert main(ExecutionArguments(programs=only, against=tmp_path, length=128)) == 0
    assert main(ExecutionArguments(programs=("attention/unable",), against=tmp_path, length=128)) == 1


def test_a_group_whose_libraries_are_missing_is_told(few, tmp_path, capsys):
    main(ExecutionArguments(write=tmp_path, length=128))
    words = ("update/base", "attention/other")
    assert main(ExecutionArguments(programs=words, against=tmp_path, length=128)) == 0
    assert "No module named 'datasets'" in capsys.readouterr().out
    assert main(ExecutionArguments(programs=("attention/other",), against=tmp_path, length=128)) == 0
    assert "datasets" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="no program 'attention/missing'"):
        main(ExecutionArguments(programs=("attention/missing",), against=tmp_path, length=128))


def test_no_program_begins_after_its_time(few, tmp_path, capsys):
    main(ExecutionArguments(write=tmp_path, length=128))
    assert main(ExecutionArguments(against=tmp_path, length=128, seconds=-1)) == 1
    assert f"{len(PROGRAMS)} {NOT_COMPARED}" in capsys.readouterr().out
    assert main(ExecutionArguments(write=tmp_path / "none", length=128, seconds=-1)) == 1
    assert not list((tmp_path / "none").iterdir())


def test_a_program_on_a_gpu_must_call_its_kernel(tmp_path, monkeypatch):
    each = program("attention/hopper/causal/t33/fwd", added)
    execution.write_all({"attention/chunked/causal/t33/fwd": each}, tmp_path, float("inf"))
    assert compare(each, tmp_path)["status"] == AGREES
    monkeypatch.setattr(execution.machine, "platform_name", lambda: "gpu")
    assert compare(each, tmp_path)["reason"] == "RuntimeError: the program does not call hopper, but nothing"


@pytest.mark.parametrize(
    ("mine", "wanted", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([0.0, 2.0], [0.0, 0.0], 2.0),
        ([np.nan, 4.0], [np.nan, 4.0], 0.0),
        ([np.nan, 4.0], [3.0, 4.0], np.inf),
        ([3.0, 4.0, 5.0], [3.0, 4.0], np.inf),
    ],
)
def test_the_error_of_an_array(mine, wanted, error):
    assert errors([np.float32(mine)], [np.float32(wanted)]) == pytest.approx([error])


def test_a_length_that_no_tiles_fill_is_refused():
    with pytest.raises(ValueError, match=r"length \(100\) must be a multiple of 128"):
        main(ExecutionArguments(length=100))


def test_each_program_has_one_that_the_cpu_computes():
    found, _ = execution.programs_here(256)
    assert {execution.reference_of(name) for name in found} <= found.keys()
    assert {each.group for each in found.values()} == {"attention", "kernel", "decode", "update"}
    assert all("/t65536/" not in name for name in found)
