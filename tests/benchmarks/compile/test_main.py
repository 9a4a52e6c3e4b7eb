"""The command, with answers that are made up."""

import pytest

from benchmarks.bench.record import COMPILED, read
from benchmarks.compile import __main__ as command
from benchmarks.compile import attention_programs, programs
from benchmarks.compile.__main__ import main, parse, plan
from benchmarks.compile.programs import PROGRAMS
from benchmarks.compile.targets import TARGETS, Target
from benchmarks.compile.update_programs import TRAININGS

ANSWER = {
    "status": COMPILED,
    "compile_seconds": 1.5,
    "temp_bytes": 3 * 2**20,
    "argument_bytes": 2**30,
    "output_bytes": 2**30,
    "collectives": [{"kind": "all-gather", "count": 2, "runs": 14, "bytes": 7 * 2**20, "exact": False}],
    "kernels": [{"name": "kern", "registers": 68, "spill_bytes": 24, "shared_bytes": 2048}],
    "moved_bytes": 5 * 2**20,
    "moved_exact": False,
    "kernel_bytes": None,
    "products_flop": 3e9,
    "products_bound": "",
    "flop": 8e9,
    "flop_bound": ">=",
    "warnings": ["Involuntary full rematerialization"],
}


class MadeUpChild:
    """A compiler that refuses window masks."""

    def __init__(self, target, limit):
        self.hello = {"device": "made up", "versions": {"libtpu": "7"}}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def compile(self, name, seconds):
        if "window" in name:
            return {"status": "failed", "reason": "XlaRuntimeError: " + 70 * "no "}
        return ANSWER


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(Target, "missing", lambda target: None)
    monkeypatch.setattr(command, "Child", MadeUpChild)


def test_from_end_to_end(installed, tmp_path, capsys):
    words = ["--programs", "attention/chunked,ring/causal/t8192/fwd", "--targets", "v5e-1", "v5e-8", "h200-1"]
    words += ["--json", str(tmp_path / "rows.jsonl"), "--plot", str(tmp_path / "chart.png")]
    assert main(parse(words)) == 0
    rows, shown = read(tmp_path / "rows.jsonl"), capsys.readouterr().out
    assert [row["target"] for row in rows] == ["v5e-1"] * 10 + ["v5e-8"] + ["h200-1"] * 10
    (ring,) = [row for row in rows if row["target"] == "v5e-8"]
    assert (ring["program"], ring["devices"], ring["flop_per_device"]) == ("ring/causal/t8192/fwd", 8, 1e9)
    assert ring["planned_bytes"] == 2 * 2**30 + 3 * 2**20
    assert "gather 7.00 MiB (14+), kern: 68 registers, 24 B of spills, 2.00 KiB" in shown
    assert ">=1.00" in shown
    assert "XlaRuntimeError: no no" in shown
    assert max(len(row["reason"]) for row in rows) == 120
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".png", ".svg"}


def test_a_program_that_does_not_fit_is_marked(installed, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(ANSWER, "temp_bytes", 17 * 2**30)
    words = ["--programs=attention/chunked/full/t8192/fwd", "--targets", "v5e-1", "h200-1"]
    main(parse([*words, "--json", str(tmp_path / "rows.jsonl")]))
    assert [row["fits"] for row in read(tmp_path / "rows.jsonl")] == [False, True]
    assert capsys.readouterr().out.count("more than the 14.9 GiB of the device") == 1


def test_nothing_that_compiles_is_an_error(installed):
    assert main(parse(["--programs", "attention/chunked/window", "--targets", "v5e-1"])) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--targets", "v7"], "no target 'v7': give v5e-1, "),
        (["--programs", "attention/nothing"], "no program 'attention/nothing': give .*attention/chunked, "),
        (["--programs", "attention/chunk"], "no program 'attention/chunk'"),
        (["--seconds", "0"], r"seconds \(0\) must be at least 1"),
        (["--programs", "ring", "--targets", "v5e-1"], "made for v5e-4, v5e-8, .*not for v5e-1"),
    ],
)
def test_bad_words_are_told_before_anything_is_compiled(installed, words, told):
    with pytest.raises(ValueError, match=told):
        plan(parse(words))


def test_a_missing_compiler_names_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(Target, "environment", property(lambda target: tmp_path / f".venv-aot-{target.platform}"))
    with pytest.raises(ValueError, match=r"v5e-1: the compiler for TPUs is not installed: run `make \.venv-aot-tpu`"):
        plan(parse(["--targets", "v5e-1"]))


def test_lists_every_name(capsys):
    assert main(parse(["--list"])) == 0
    assert capsys.readouterr().out.split() == [*PROGRAMS, *TARGETS]


def test_every_implementation_of_attention_is_compiled():
    attention = {name.split("/")[1] for name in PROGRAMS if name.startswith("attention/")}
    # `decode` and `kernel` attend with those that read a cache.
    assert attention | {"cached", "tpu_cached", "hopper_cached"} == set(attention_programs._installed())
    assert {name.split("/")[1] for name in programs.SHORT} == attention


def test_every_axis_of_a_mesh_has_its_update():
    axes = {name.split("/")[2] for name in PROGRAMS if name.startswith("update/")}
    assert axes == {"data", "fsdp", "tensor", "sequence", "expert"}


@pytest.mark.parametrize("name", TRAININGS)
def test_batches_are_those_of_packed_texts(name):
    batch = TRAININGS[name].batch(3)
    assert {shape.shape[0] for shape in batch.values()} == {3}
    assert batch["label"].shape == batch["target"].shape
    assert batch["source_segment"].shape == batch["source"].shape
