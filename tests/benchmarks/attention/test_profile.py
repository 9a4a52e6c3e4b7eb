"""Which row is profiled, and what becomes of a trace."""

import json
import types

import pytest

from benchmarks.attention import profile
from benchmarks.attention.__main__ import main as measure
from benchmarks.attention.__main__ import parse
from benchmarks.attention.profile import Kernel, ProfileArguments, case_of, kernels, lines_of, main, slowest
from benchmarks.bench.record import REFUSED, TIMED, read


def row(implementation, speed, status=TIMED):
    return {"implementation": implementation, "flop_per_second": speed, "status": status}


def test_the_slowest_row_has_a_time_and_the_fewest_operations_a_second():
    rows = [row("seqattn:a", 3.0), row("seqattn:b", 2.0), row("torch:c", 1.0), row("seqattn:d", None, REFUSED)]
    assert slowest(rows, "seqattn") == rows[1]
    assert slowest(rows) == rows[2]
    with pytest.raises(ValueError, match="no row of tokamax has a time"):
        slowest(rows, "tokamax")


def event(name, nanoseconds, **stats):
    return types.SimpleNamespace(name=name, duration_ns=nanoseconds, start_ns=0.0, stats=list(stats.items()))


def trace(planes):
    """A trace as `ProfileData` shows it, of events by plane and line."""
    named = types.SimpleNamespace
    lines = {name: [named(name=n, events=e) for n, e in of.items()] for name, of in planes.items()}
    return named(planes=[named(name=name, lines=of) for name, of in lines.items()])


def test_kernels_of_a_gpu_are_those_of_its_streams():
    on_streams = [event("gemm", 3000.0), event("seqattn_hopper", 5000.0), event("gemm", 1000.0)]
    lines = {"Stream #13(Compute)": on_streams, "XLA Ops": [event("fusion", 9000.0, hlo_op="fusion")]}
    found = kernels(trace({"/device:GPU:0": lines, "/host:CPU": {"python": [event("main", 1e9)]}}), calls=2)
    assert found == [
        Kernel("seqattn_hopper", 0.5, 2.5e-6, 5 / 9),
        Kernel("gemm", 1.0, 2e-6, 4 / 9),
    ]


def test_the_rest_is_one_line():
    found = [Kernel(name, 1.0, seconds, seconds / 7) for name, seconds in (("a", 4.0), ("b", 2.0), ("c", 1.0))]
    of = dict.fromkeys(("shape", "mask", "pass", "dtype", "implementation", "median_seconds"), "x")
    lines = lines_of(of, found, most=1)
    assert [line["kernel"] for line in lines] == ["a", "2 others"]
    assert [line["seconds_per_call"] for line in lines] == [4.0, 3.0]
    assert sum(line["share"] for line in lines) == pytest.approx(1)
    assert [line["kernel"] for line in lines_of(of, found, most=3)] == ["a", "b", "c"]


def test_from_rows_to_kernels(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows, kept = tmp_path / "rows.jsonl", tmp_path / "deep" / "kernels.jsonl"
    words = ["--shapes", "b1-t67-n2-d8", "--masks", "causal", "--pass", "bwd", "--rounds", "1", "--product-size", "8"]
    assert measure(parse([*words, "--implementations", "seqattn:reference", "--json", str(rows)])) == 0
    assert main(ProfileArguments(rows, json=kept, kernels=2)) == 0
    lines = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    assert len(lines) == 3
    assert lines[2]["kernel"].endswith(" others")
    assert lines[0]["share"] >= lines[1]["share"] > 0
    assert sum(line["share"] for line in lines) == pytest.approx(1)
    assert {(line["implementation"], line["mask"], line["pass"]) for line in lines} == {
        ("seqattn:reference", "causal", "bwd")
    }
    assert "b1-t67-n2-d8 causal bwd" in capsys.readouterr().out
    assert case_of(read(rows)[0]).shape.query == (1, 67, 2, 8)


def test_a_trace_without_kernels_fails(tmp_path, monkeypatch, capsys):
    program = types.SimpleNamespace(run=lambda: None, wait=lambda result: None)
    monkeypatch.setattr(profile, "read", lambda path: [row("seqattn", 1.0) | FIELDS])
    monkeypatch.setitem(profile.implementations.NAMES, "seqattn", lambda case, inputs: program)
    monkeypatch.setattr(profile, "trace", lambda program: trace({}))
    assert main(ProfileArguments(tmp_path / "rows")) == 1


FIELDS = {
    "shape": "tiny",
    "origin": "here",
    **{"batch": 1, "length": 2, "num_keys": 2, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2},
    **{"mask": "full", "pass": "fwd", "dtype": "float32", "median_seconds": 1.0},
}
