"""Each implementation computes the case that it is given, in its own words."""

import sys

import pytest

from benchmarks.attention import exact, implementations, patterns
from benchmarks.attention.case import AttentionCase
from benchmarks.attention.shapes import named
from benchmarks.bench import machine
from seqattn.kernels.dispatch import IMPLEMENTATIONS

(SHAPE,) = named("b2-t37-n4-k2-d8")
ON_CPU = ["seqattn:reference", "jax.nn:xla", "flax.nnx"]


WITHOUT_CAP = ["jax.nn:xla", "flax.nnx", "torch:sdpa"]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        (name, pattern)
        for name in ON_CPU
        for pattern in patterns.PATTERNS
        if not (name in WITHOUT_CAP and pattern == "cap")
    ],
)
def test_output_and_gradients_are_right(name, pattern, monkeypatch):
    monkeypatch.setattr(patterns, "WINDOW", 7)
    case = AttentionCase(SHAPE, pattern, "bwd", "float32")
    program = implementations.NAMES[name](case, case.inputs())
    results = program.arrays(program.run())
    assert [x.shape for x in results] == [x.shape for x in (*list(case.inputs())[3:], *list(case.inputs())[:3])]
    assert exact.solve(case).error(results).right
    assert program.planned_bytes > sum(x.nbytes for x in results)


def test_the_default_choice_tells_what_it_chose():
    case = AttentionCase(SHAPE, "documents", "fwd", "float32")
    how = implementations.NAMES["seqattn"](case, case.inputs()).how
    chosen, _, words = how.partition(", ")
    assert chosen in IMPLEMENTATIONS
    assert words.endswith("Causal() & SameSegment()")


@pytest.mark.filterwarnings("default")  # PyTorch's compiler deprecates parts of itself
@pytest.mark.parametrize("name", ["torch:sdpa", pytest.param("torch:flex", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pattern", sorted(patterns.PATTERNS.keys() - {"cap"}))
def test_pytorch_is_asked_for_the_same(name, pattern, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(patterns, "WINDOW", 7)
    case = AttentionCase(SHAPE, pattern, "bwd" if name == "torch:sdpa" else "fwd", "float32")
    program = implementations.NAMES[name](case, case.inputs())
    assert exact.solve(case).error(program.arrays(program.run())).right


@pytest.mark.parametrize("name", WITHOUT_CAP)
def test_a_library_without_a_soft_cap_refuses_it(name):
    if name.startswith("torch"):
        pytest.importorskip("torch")
    case = AttentionCase(SHAPE, "cap", "fwd", "float32")
    with pytest.raises(NotImplementedError, match="has no soft cap"):
        implementations.NAMES[name](case, case.inputs())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_flex_attention_caps_scores():
    pytest.importorskip("torch")
    case = AttentionCase(SHAPE, "cap", "fwd", "float32")
    program = implementations.NAMES["torch:flex"](case, case.inputs())
    assert exact.solve(case).error(program.arrays(program.run())).right


def test_what_needs_more_memory_than_there_is_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda: 1000)
    case = AttentionCase(SHAPE, "full", "fwd", "float32")
    with pytest.raises(NotImplementedError, match="temporaries"):
        implementations.NAMES["jax.nn:xla"](case, case.inputs())


@pytest.mark.parametrize("name", ["torch:sdpa", "torch:flex", "torch:flash-2", "torch:flash-3", "tokamax"])
def test_peers_are_imported_only_when_they_are_asked(name, monkeypatch):
    for module in ("torch", "tokamax"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError):
        implementations.NAMES[name](AttentionCase(SHAPE, "full", "fwd", "float32"), [])


def test_all_of_ours_have_a_name():
    assert {f"seqattn:{name}" for name in IMPLEMENTATIONS} | {"seqattn"} <= set(implementations.NAMES)
    assert set(implementations.SHORT) <= set(implementations.default()) <= set(implementations.NAMES)
